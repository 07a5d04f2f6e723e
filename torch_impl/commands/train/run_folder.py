"""The folder of a training run, which one training at a time may write to.

Rank 0 locks its file ``lock``, which names the process.  The system unlocks it when that ends.
"""

import fcntl
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import EEXIST, ENOLCK, ENOSYS, EOPNOTSUPP, EWOULDBLOCK
from pathlib import Path

from lvxattn.cli import InputError
from lvxattn.common.new_file import check_target
from lvxattn.torch_impl.commands.processes import on_rank_0
from lvxattn.torch_impl.commands.train import checkpoint
from lvxattn.torch_impl.group import Group

_LOCK, _PROCESS = "lock", b"process "
_COMPLETE = checkpoint.NAME, checkpoint.OLD
_NO_LOCKS = (ENOLCK, ENOSYS, EOPNOTSUPP)  # of file systems that have none


@contextmanager
def run_folder(folder: Path, group: Group, *, resume: bool) -> Iterator[None]:
    """Make a folder if there is none, and keep other trainings out of it.

    What killed trainings left of unfinished checkpoints is removed.  On a file system without locks
    rank 0 warns, and no training is kept out.

    Collective: every rank of the group calls this.

    Raises
    ------
    InputError
        Another training is in there, or a former one that is not to be resumed, or it cannot be
        written; the same on all ranks.
    """
    with ExitStack() as held:

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(folder / _LOCK))
            if not resume and any((folder / name).exists() for name in _COMPLETE):
                raise InputError(
                    f"--output: {folder} holds a training: continue it with --resume, or give "
                    "another folder"
                )
            for left in folder.iterdir():
                if checkpoint.UNFINISHED.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)
            check_target(folder / "curve.csv")

        on_rank_0(begin, f"--output: cannot write {folder}", group)
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:  # a link, a folder
        raise OSError(error.errno, f"{path.name}: {error.strerror}") from None
    with open(fd, "r+b", 0) as file:
        held = file.read(100) if stat.S_ISREG(os.fstat(fd).st_mode) else b"a device"
        if held and not held.startswith(_PROCESS):
            raise OSError(EEXIST, f"{path.name}: not the file of a training")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = "".join(filter(str.isprintable, held.decode(errors="replace")))
            raise OSError(EWOULDBLOCK, f"another training is in there, {holder}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, f"it cannot be locked: {error.strerror}") from None
            text = (
                f"{path.parent} cannot be locked ({error.strerror}): start no other training in it"
            )
            print(f"lvxattn train: warning: --output: {text}", file=sys.stderr, flush=True)
        # The file stays: a lock on one that is removed excludes nobody.
        file.seek(0)
        file.truncate()
        file.write(f"{_PROCESS.decode()}{os.getpid()} on {socket.gethostname()}".encode())
        yield

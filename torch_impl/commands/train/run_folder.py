"""The folder of a training run, which one training at a time may write to.

Rank 0 locks its file ``lock``, which names the process.  The system unlocks it when that ends.
"""

import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP, EWOULDBLOCK
from pathlib import Path

from lvxattn.common.new_file import check_target
from lvxattn.torch_impl.commands.processes import on_rank_0
from lvxattn.torch_impl.commands.train import checkpoint
from lvxattn.torch_impl.group import Group

_LOCK = "lock"
_NO_LOCKS = (ENOLCK, ENOSYS, EOPNOTSUPP)  # of file systems that have none


@contextmanager
def run_folder(folder: Path, group: Group) -> Iterator[None]:
    """Make a folder if there is none, and keep other trainings out of it.

    What killed trainings left of unfinished checkpoints is removed.  On a file system without locks
    rank 0 warns, and no training is kept out.

    Collective: every rank of the group calls this.

    Raises
    ------
    InputError
        Another training is in there, or it cannot be written; the same on all ranks.
    """
    with ExitStack() as held:

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(folder / _LOCK))
            for left in folder.glob(f"{checkpoint.NEW}*"):
                shutil.rmtree(left, ignore_errors=True)
            check_target(folder / "curve.csv")

        on_rank_0(begin, f"--output: cannot write {folder}", group)
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with open(path, "r+b", 0, opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = "".join(filter(str.isprintable, file.read(100).decode(errors="replace")))
            raise OSError(EWOULDBLOCK, f"another training is in there, {holder}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, f"it cannot be locked: {error.strerror}") from None
            text = (
                f"{path.parent} cannot be locked ({error.strerror}): start no other training in it"
            )
            print(f"lvxattn train: warning: --output: {text}", file=sys.stderr, flush=True)
        # The file stays: a lock on one that is removed excludes nobody.
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield

"""Write files as a whole: a reader finds the old file or the new one, however the writer ends.

    .lvxattn-<128 random bits>     written beside the target; created by this writer or not at all,
                                   so that links and other files of that name are left alone
    TARGET                         replaced by it, in one rename, once it is on the disk

A new file that is not complete is removed: by the writer after an error or an interrupt, and by a
guard if the writer is killed.  The guard is a shell that reads from a pipe of the writer: a line
means that all is done, and an end without one that the writer is dead.  A complete one stays if it
cannot be renamed.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EROFS, ESTALE
from io import BufferedWriter
from pathlib import Path
from secrets import token_hex
from stat import S_IMODE

from lvxattn.common.regular_file import check_regular

_OF_DISKS = (EDQUOT, EFBIG, EIO, ENOSPC, EROFS, ESTALE)


@contextmanager
def new_file(target: str | Path) -> Iterator[BufferedWriter]:
    """Write a file that replaces the target when the block ends without an error.

    Not collective: one process calls this.  Other processes, on any host that sees the folder, may
    write into the new file by its name until the block ends.

    Parameters
    ----------
    target : str
        A regular file, or a name for one.  A link is followed when the block begins: the file that
        it then leads to is replaced.  An existing file's mode is kept and, where permitted, its
        owner and its group; a new one gets those of any new file.

    Yields
    ------
    file
        The new file, binary; its ``name`` is an absolute path in the target's folder.

    Raises
    ------
    OSError
        The target is no regular file or may not be written, there is no space, or the like.  It
        names the target, which is left as it was, and the new file if only renaming it failed.

    Examples
    --------
    >>> with new_file("numbers.txt") as file:
    ...     size = file.write(b"1 2 3")
    >>> Path("numbers.txt").read_text()
    '1 2 3'
    """
    path = os.path.realpath(target)
    name = os.path.join(os.path.dirname(path), f".lvxattn-{token_hex(16)}")
    with naming(target, name):
        old = _status(path, target)
        with _guard(name):
            file = _create(name, 0o666 if old is None else 0o600)
            keep = False
            try:
                if old is not None:
                    _keep_mode(file, old)
                yield file
                file.flush()
                os.fsync(file.fileno())
                try:
                    os.replace(name, path)
                except OSError as error:
                    keep = True  # it may be hours of work
                    text = f"{error.strerror}; the complete file is {name}"
                    raise OSError(error.errno, text, name) from None
            finally:
                with suppress(FileNotFoundError):  # it has its new name
                    if not keep:
                        os.unlink(name)
                with suppress(OSError):  # it tries again to write what there is no space for
                    file.close()
        _sync_folder(os.path.dirname(path))


def write_file(target: str | Path, content: str | bytes) -> None:
    """Write text, in UTF-8, or bytes: see `new_file`.

    Parameters
    ----------
    target : str
    content : str or bytes

    Raises
    ------
    OSError
    """
    with new_file(target) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def check_target(target: str | Path) -> None:
    """Raise if `new_file` could not begin to write a file; leave everything as it is.

    Parameters
    ----------
    target : str

    Raises
    ------
    OSError
    """
    with suppress(_Tried), new_file(target):
        raise _Tried


@contextmanager
def naming(target: str | Path, name: str) -> Iterator[None]:
    """Have errors of writing into a new file name its target.

    Parameters
    ----------
    target : str
    name : str
        The new file's name.
    """
    try:
        yield
    except OSError as error:
        # Errors of writing name no file, and neither do those of connections.
        if error.filename != name and (error.filename or error.errno not in _OF_DISKS):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error


class _Tried(Exception):  # noqa: N818 - no error
    pass


def _status(path: str, target: str | Path) -> os.stat_result | None:
    """Return the status of the file to be replaced, if there is one."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    check_regular(target, found)
    if not os.access(path, os.W_OK):
        raise OSError(EACCES, os.strerror(EACCES), str(target))
    return found


def _create(name: str, mode: int) -> BufferedWriter:
    """Create the new file; a link of that name is an error, wherever it leads."""
    try:
        return open(name, "xb", opener=lambda path, flags: os.open(path, flags, mode))
    except OSError as error:
        folder = os.path.dirname(name)
        text = f"there is no folder {folder}"
        if os.path.isdir(folder):
            text = f"{error.strerror}, for a new file in {folder}"
        raise OSError(error.errno, text, name) from None


def _keep_mode(file: BufferedWriter, old: os.stat_result) -> None:
    """Give the new file the old one's mode and, if this user may, its group and its owner."""
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):  # either may be refused
        with suppress(PermissionError):
            os.fchown(file.fileno(), owner, group)
    os.fchmod(file.fileno(), S_IMODE(old.st_mode) & 0o777)


@contextmanager
def _guard(name: str) -> Iterator[None]:
    """Have a file removed if this process is killed before the block ends."""
    command = ["/bin/sh", "-c", 'read line || rm -f -- "$1"', "sh", name]
    guard = None
    with suppress(OSError):  # where no process can be started, no guard
        guard = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # whatever ends this process may end its group
        )
    try:
        yield
    finally:
        if guard is not None:
            guard.communicate(b"\n")


def _sync_folder(folder: str) -> None:
    """Make a rename survive a loss of power; some file systems and permissions do not let us."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

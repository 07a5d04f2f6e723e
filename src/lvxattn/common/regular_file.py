"""Open files for reading, and refuse what is no regular file.

Opening a FIFO waits for its other end, which may never come, and opening a device may act on it.
"""

import os
import stat
from contextlib import ExitStack
from errno import EINVAL, EISDIR
from io import FileIO
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link that leads nowhere",
}


def open_regular(path: str | Path) -> FileIO:
    """Open a file for reading, without buffering.

    Parameters
    ----------
    path : str
        Links are followed.

    Returns
    -------
    io.FileIO

    Raises
    ------
    OSError
        It is no regular file, or cannot be opened.
    """
    check_regular(path, os.stat(path))
    # It may have become another by now: a FIFO is not waited for, nor taken.
    with ExitStack() as opened:
        file = opened.enter_context(open(path, "rb", 0, opener=_open_at_once))
        check_regular(path, os.fstat(file.fileno()))
        opened.pop_all()
    return file


def check_regular(path: str | Path, found: os.stat_result) -> None:
    """Raise unless a file is a regular one.

    Parameters
    ----------
    path : str
        Named in the error.
    found : os.stat_result
        Its status.

    Raises
    ------
    OSError
    """
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        text = f"expected a regular file, got {_KINDS.get(kind, 'a device')}"
        raise OSError(EISDIR if kind == stat.S_IFDIR else EINVAL, text, str(path))


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def printable(text: str) -> str:
    r"""Return a text from a file as one line: what cannot be printed is escaped.

    Parameters
    ----------
    text : str

    Returns
    -------
    str

    Examples
    --------
    >>> printable("é\n")
    'é\\n'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

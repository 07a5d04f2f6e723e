"""The files through which a notebook, its cell's ranks and their guards communicate.

See `rank` and `guard` for a list.  From them come variables, what the ranks printed, where they
are, and how they failed.
"""

import os
import pickle
import re
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from lvxattn.common.regular_file import open_regular

CELL = "cell"  # its file name in tracebacks
# Seconds for all ranks to write their stacks.
_GRACE = 0.5
# Maximum bytes shown of a rank's output, half from its beginning and half from its end.
_SHOWN = 50_000
_ADVICE = {
    "--take": "which only the notebook has; define it in the cell, or in a module",
    "--give": "which only the cell has; define it in a module",
}


class CellError(RuntimeError):
    """A cell failed.

    Parameters
    ----------
    text : str
    printed : iterable of str
        The output of each rank until then.
    """

    def __init__(self, text: str, printed: Iterable[str] = ()) -> None:
        super().__init__(text)
        self.printed = list(printed)

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the ranks' failure, without the notebook's own frames."""
        return [f"CellError: {self}"]


class RefusedError(CellError):
    """A cell's request that cannot be met; the message says it all."""


def store(path: Path, variables: dict[str, Any], option: str) -> None:
    """Write variables to a file.

    Parameters
    ----------
    path : Path
    variables : dict
    option : {"--take", "--give"}
        The option that sends them: to the ranks, or back.

    Raises
    ------
    RefusedError
        A variable cannot be pickled.
    """
    with open(path, "wb") as file:
        # One pickler for all variables: two names of one array stay one array.
        pickler = _Pickler(file)
        pickler.dump(list(variables))
        for name, value in variables.items():
            try:
                pickler.dump(value)
            except _LocalError as error:
                raise RefusedError(
                    f"{option}: {name} needs the {error}, {_ADVICE[option]}"
                ) from None
            except Exception as error:  # types raise various errors here
                raise RefusedError(f"{option}: {name} cannot be pickled: {_told(error)}") from None


def load(path: Path, option: str) -> dict[str, Any]:
    """Read the variables that `store` wrote.

    A pickle may run code.  So only a file of this user is read, which lies in a folder that nobody
    else may write to (`tempfile.TemporaryDirectory`).

    Raises
    ------
    RefusedError
        The file is another user's, or a variable cannot be unpickled, as when its class cannot be
        imported here.
    """
    with BufferedReader(open_regular(path)) as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise RefusedError(f"{option}: {path} belongs to another user, and is not read")
        unpickler = pickle.Unpickler(file)
        variables = {}
        for name in unpickler.load():
            try:
                variables[name] = unpickler.load()
            except Exception as error:
                raise RefusedError(
                    f"{option}: {name} cannot be unpickled: {_told(error)}"
                ) from None
    return variables


def printed(folder: Path, ranks: int) -> list[str]:
    """Return each rank's output; the beginning and the end, if it is long."""
    return [_printed(folder / f"printed.{rank}") for rank in range(ranks)]


def ask(folder: Path, ranks: int) -> None:
    """Make all ranks write their stacks."""
    for process in (_rank(folder, rank).process for rank in range(ranks)):
        # The process id of a rank that has ended may be another process's.
        if process and not (folder / f"status.{process}").exists():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGUSR1)
    time.sleep(_GRACE)


def where(folder: Path, source: str, ranks: int) -> str:
    """Return the line of the cell at which each rank is, as text."""
    told = (f"rank {rank} {_place(_rank(folder, rank), source)}" for rank in range(ranks))
    return "\n".join(told)


def failed(folder: Path, source: str, ranks: int) -> str:
    """Return why ranks failed; empty if no rank and no guard has written it."""
    for path in _by_time(folder, "refused.*"):
        return path.read_text("utf-8")
    return (
        _orphaned(folder, ranks)
        or _raised(folder, ranks)
        or _died(folder, source, ranks)
        or _aborted(folder, ranks)
    )


class _LocalError(Exception):
    """A function or class that another process cannot import."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Reject what is defined in ``__main__``, which is another module in other processes."""
        if isinstance(value, type | FunctionType) and value.__module__ == "__main__":
            kind = "class" if isinstance(value, type) else "function"
            raise _LocalError(f"{kind} {value.__qualname__}")
        return NotImplemented


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _printed(path: Path) -> str:
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        more = os.fstat(file.fileno()).st_size - _SHOWN
        if more <= 0:
            return _settled(file.read())
        first = _settled(file.read(_SHOWN // 2))
        file.seek(more, os.SEEK_CUR)
        last = _settled(file.read(_SHOWN // 2))
    return f"{first}\n... {more:,} bytes are left out here ...\n{last}"


def _settled(text: bytes) -> str:
    """Return text as a terminal shows it: only the last state of a progress bar."""
    lines = text.decode(errors="replace").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def _orphaned(folder: Path, ranks: int) -> str:
    """Return which rank's guard was the first to be killed."""
    for path in _by_time(folder, "orphan.*"):
        return f"rank {path.suffix[1:]} of {ranks} has ended with its guard, which was killed"
    return ""


def _raised(folder: Path, ranks: int) -> str:
    """Return the exceptions, equal ones once, in order of time."""
    raised: dict[str, tuple[str, list[int]]] = {}
    for path in _by_time(folder, "raised.*"):
        text = path.read_text("utf-8").rstrip()
        same = re.sub("0x[0-9a-f]+", "", text)  # equal but for addresses
        raised.setdefault(same, (text, []))[1].append(int(path.suffix[1:]))
    told = []
    for text, who in raised.values():
        names = f"rank{'s' * (len(who) > 1)} {', '.join(map(str, sorted(who)))}"
        told.append(f"{names} of {ranks} raised\n{text}")
    return "\n\n".join(told)


def _died(folder: Path, source: str, ranks: int) -> str:
    """Return which rank was the first to end too early; the launcher then ended the others."""
    by_process = {(it := _rank(folder, number)).process: it for number in range(ranks)}
    for path in _by_time(folder, "status.*"):
        rank, status = by_process.get(int(path.suffix[1:])), int(path.read_text())
        if rank is None or (status == 0 and rank.done):
            continue
        if status < 0:
            how = f"was ended by signal {-status} ({signal.strsignal(-status)})"
        else:
            how = f"left with status {status}"
        when = f"{'after' if rank.done else 'before'} the end of the cell"
        return f"rank {rank.number} of {ranks} {how} {_line(rank.main, source) or when}"
    return ""


def _aborted(folder: Path, ranks: int) -> str:
    """Return which rank called MPI_Abort: MPICH prints that on the rank, and kills it at once."""
    for rank, text in enumerate(printed(folder, ranks)):
        if said := re.search(r"^Abort\((\d+)\) on node", text, re.MULTILINE):
            return f"rank {rank} of {ranks} called MPI_Abort, with status {said[1]}"
    return ""


class _Rank(NamedTuple):
    """The state of a rank by its files: see `rank`.

    Attributes
    ----------
    number : int
    process : int or None
        None if it has not started.
    done : bool
        Whether it has run the whole cell.
    main : str
        The stack of its main thread, as `faulthandler` writes it; empty before `ask`.
    others : list of str
        The stacks of its other threads.
    """

    number: int
    process: int | None = None
    done: bool = False
    main: str = ""
    others: Sequence[str] = ()


def _rank(folder: Path, number: int) -> _Rank:
    path = folder / f"stack.{number}"
    head, started, told = (path.read_text() if path.exists() else "").partition("\n")
    if not started:
        return _Rank(number)
    process, main = head.split()
    parts = re.split(r"^(?:Current t|T)hread 0x0*([0-9a-f]+).*\n", told, flags=re.MULTILINE)
    stacks = dict(zip(parts[1::2], parts[2::2], strict=True))
    done = (folder / f"done.{process}").exists()
    return _Rank(number, int(process), done, stacks.pop(main, ""), list(stacks.values()))


def _place(rank: _Rank, source: str) -> str:
    if rank.process is None:
        return "has not started"
    if rank.done:
        left = [line for stack in rank.others if (line := _line(stack, source))]
        return "has run the whole cell" + (f"; a thread of it is {left[0]}" if left else "")
    if line := _line(rank.main, source):
        return f"is {line}"
    if at := re.search(r'File "(.*)", line (\d+)', rank.main):  # too deep: the cell is cut off
        return f"is in {Path(at[1]).name}, line {at[2]}"
    return "is at an unknown line"


def _line(stack: str, source: str) -> str:
    """Return the line of the cell that a thread is at; empty if unknown."""
    at = re.search(rf'File "{CELL}", line (\d+)', stack)  # the innermost call comes first
    if at is None:
        return ""
    number = int(at[1])
    return f"at line {number}: {''.join(source.splitlines()[number - 1 : number]).strip()}"


def _by_time(folder: Path, pattern: str) -> list[Path]:
    """Return files, oldest first, without those whose writer was killed before writing."""
    found = [(path, path.stat()) for path in folder.glob(pattern)]
    return [path for path, it in sorted(found, key=lambda x: x[1].st_mtime_ns) if it.st_size]

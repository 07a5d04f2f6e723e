"""What is said of a cell: what its ranks printed, where they are, and how they failed.

Ranks and their guards leave it in files: see `rank` and `guard`.
"""

import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

CELL = "cell"  # the name of its file in tracebacks
# Seconds for all ranks to write down where they are.
_GRACE = 0.5
# Bytes of what a rank printed that are shown, half of them from its beginning and half from its
# end: one in an endless loop may print a great deal.
_SHOWN = 50_000


class CellError(RuntimeError):
    """A cell's ranks did not end well.

    Parameters
    ----------
    text : str
    printed : iterable of str
        What the ranks had printed until then.
    """

    def __init__(self, text: str, printed: Iterable[str] = ()) -> None:
        super().__init__(text)
        self.printed = list(printed)

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: what went wrong on the ranks, not how that was found."""
        return [f"CellError: {self}"]


class RefusedError(CellError):
    """What a cell asks for cannot be done; there is no more to it than this sentence."""


def printed(folder: Path, ranks: int) -> list[str]:
    """Return what each rank printed; the beginning and the end, if that is very much."""
    return [_printed(folder / f"printed.{rank}") for rank in range(ranks)]


def ask(folder: Path, ranks: int) -> None:
    """Have all ranks write down where they are."""
    for process in (_rank(folder, rank).process for rank in range(ranks)):
        # A rank that has ended may have left its number to another process.
        if process and not (folder / f"status.{process}").exists():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGUSR1)
    time.sleep(_GRACE)


def where(folder: Path, source: str, ranks: int) -> str:
    """Say at which line of the cell each rank is."""
    told = (f"rank {rank} {_place(_rank(folder, rank), source)}" for rank in range(ranks))
    return "\n".join(told)


def failed(folder: Path, source: str, ranks: int) -> str:
    """Say why ranks failed; nothing if no rank and no guard has written it down."""
    for path in _by_time(folder, "refused.*"):
        return path.read_text("utf-8")
    return _raised(folder, ranks) or _died(folder, source, ranks) or _aborted(folder, ranks)


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
    """Return text as a terminal leaves it: of a bar of progress the last state only."""
    lines = text.decode(errors="replace").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def _raised(folder: Path, ranks: int) -> str:
    """Return what was raised, each different thing once, the first first."""
    raised: dict[str, tuple[str, list[int]]] = {}
    for path in _by_time(folder, "raised.*"):
        text = path.read_text("utf-8").rstrip()
        same = re.sub("0x[0-9a-f]+", "", text)  # what differs in an address only
        raised.setdefault(same, (text, []))[1].append(int(path.suffix[1:]))
    told = []
    for text, who in raised.values():
        names = f"rank{'s' * (len(who) > 1)} {', '.join(map(str, sorted(who)))}"
        told.append(f"{names} of {ranks} raised\n{text}")
    return "\n\n".join(told)


def _died(folder: Path, source: str, ranks: int) -> str:
    """Say which rank was the first to end too early; the launcher then ended the others."""
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
    """Say which rank called MPI_Abort: MPICH has it print so, and kills it at once."""
    for rank, text in enumerate(printed(folder, ranks)):
        if said := re.search(r"^Abort\((\d+)\) on node", text, re.MULTILINE):
            return f"rank {rank} of {ranks} called MPI_Abort, with status {said[1]}"
    return ""


class _Rank(NamedTuple):
    """What a rank has written down of itself: see `rank`.

    Attributes
    ----------
    number : int
    process : int or None
        None if it has not started.
    done : bool
        Whether it has run the whole cell.
    main : str
        Where its main thread is, as `faulthandler` writes it; empty if nobody has asked.
    others : list of str
        Where its other threads are.
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
    if at := re.search(r'File "(.*)", line (\d+)', rank.main):  # too deep for the cell to be told
        return f"is in {Path(at[1]).name}, line {at[2]}"
    return "does not say where it is"


def _line(stack: str, source: str) -> str:
    """Return the line of the cell that a thread is at, or nothing."""
    at = re.search(rf'File "{CELL}", line (\d+)', stack)  # the innermost call comes first
    if at is None:
        return ""
    number = int(at[1])
    return f"at line {number}: {''.join(source.splitlines()[number - 1 : number]).strip()}"


def _by_time(folder: Path, pattern: str) -> list[Path]:
    """Return files, the oldest first, but none whose writer was killed before it wrote."""
    found = [(path, path.stat()) for path in folder.glob(pattern)]
    return [path for path, it in sorted(found, key=lambda x: x[1].st_mtime_ns) if it.st_size]

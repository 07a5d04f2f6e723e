"""Memory that is free, and a check of what ranks need before they allocate it.

Without it, a rank that allocates too much is ended by the system, without a word.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from lvxattn.common.validation import Communicator

IGNORE = "LVXATTN_IGNORE_MEMORY"
"""Environment variable: if it is set on any rank of a host, nothing is refused there."""

Room = Mapping[str, int]
"""Bytes that a process can still take below each limit on it; a limit's name is its cgroup's."""


def check_memory(need: float, comm: Communicator, change: str) -> str:
    """Check that what the ranks of each host need is free there.

    Collective: every rank of comm calls this, before it allocates anything.

    Parameters
    ----------
    need : float
        Bytes that this rank will need at least.
    comm : communicator
    change : str
        What a user can do about it, such as ``"give fewer --frames or more hosts"``.

    Returns
    -------
    str
        What the rank that needs most will need, and what is free, for people.

    Raises
    ------
    MemoryError
        It is not free, with both numbers; the same on all ranks.
    """
    host = getattr(comm, "host", None) or socket.gethostname()
    by_rank = comm.allgather((host, need, free_memory()))
    hosts, needs, rooms = map(list, zip(*by_rank, strict=True))
    return judge(hosts, needs, rooms, change)


def judge(
    hosts: Sequence[str], needs: Sequence[float], free: Sequence[Room | None], change: str
) -> str:
    """Return, or raise, what `check_memory` does, given the figures of all ranks.  Not collective.

    Ranks of one host share its memory, and those of one cgroup what is left below its limit; the
    least that one of them sees counts.
    """
    tightest, line = 0.0, f"{gigabytes(max(needs))} a rank"
    silent = {host for host, room in zip(hosts, free, strict=True) if room is None}
    shared: dict[tuple[str, str], dict[int, int]] = {}  # by host and limit: rank to bytes
    for rank, (host, room) in enumerate(zip(hosts, free, strict=True)):
        for limit, left in () if host in silent or room is None else room.items():
            shared.setdefault((host, limit), {})[rank] = left
    for (host, _), ranks in shared.items():
        available, needed = max(1, min(ranks.values())), sum(needs[rank] for rank in ranks)
        those = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {host:.24}"
        if needed > available:
            most = max(ranks, key=lambda rank: needs[rank])
            raise MemoryError(
                f"memory: expected at most {gigabytes(available)}, which is free, for {those}, got "
                f"{gigabytes(needed)}, of which rank {most} needs {gigabytes(needs[most])}; "
                f"{change}, or set {IGNORE}=1"
            )
        if needed / available >= tightest:
            tightest = needed / available
            line = f"{gigabytes(max(needs))} a rank; {gigabytes(available)} is free for {those}"
    return line


def free_memory(root: Path = Path("/")) -> Room | None:
    """Return how many bytes this process can still take, of its host (``""``) and of each cgroup.

    Swap does not count.  None where the system does not say (Linux does), or nobody is to ask.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` lie.
    """
    host = _table(root / "proc/meminfo")
    if "MemAvailable" not in host or os.environ.get(IGNORE):
        return None
    return {"": 1024 * host["MemAvailable"], **_left_in_cgroups(root)}


def _left_in_cgroups(root: Path) -> dict[str, int]:
    """Return what is left below each limit on this process: of its cgroups and those above.

    Their names are the same in all containers of a host.
    """
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        limit, used, total = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            if kinds  # version 1
            else ("memory.max", "memory.current", "")
        )
        # In a container the path may be the host's: then only the topmost is there.
        places = [base / path.strip("/"), *(base / path.strip("/")).parents]
        for place in places[: places.index(base) + 1]:
            most, now = (_lines(place / name)[:1] for name in (limit, used))
            if not (most and now) or most == ["max"]:
                continue
            # Pages of files are given up when memory is needed.
            stat = _table(place / "memory.stat")
            names = f"{total}inactive_file", f"{total}active_file", "slab_reclaimable"
            left = int(most[0]) - int(now[0]) + sum(stat.get(name, 0) for name in names)
            found["cgroup {0.st_dev}:{0.st_ino}".format(place.stat())] = max(0, left)
    return found


def _table(path: Path) -> dict[str, int]:
    """Return the numbers in a file by the words before them."""
    words = [line.replace(":", " ").split() for line in _lines(path)]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:  # it is not there: no such limit
        return []


def gigabytes(nbytes: float) -> str:
    """Format a number of bytes.

    Examples
    --------
    >>> gigabytes(251_828_961_280), gigabytes(2**20)
    ('251.8 GB', '0.001 GB')
    """
    size = nbytes / 1e9
    return f"{size:,.1f} GB" if size >= 1 else f"{size:.3f} GB"

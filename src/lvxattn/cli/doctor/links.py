"""What ranks find out together: messages really sent, clocks, a file that all hosts should see."""

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

import numpy as np

from lvxattn.cli.run_ranks import Ranks
from lvxattn.cli.run_trace import compare_clocks
from lvxattn.plan.trace import Clock

_SMALL, LARGE = 1, 2**22
_ROUNDS = {_SMALL: (3, 100), LARGE: (5, 1)}  # rounds, messages in each
_BUDGET = 2.0  # seconds after which no further round begins
_APPEARS = 3.0  # seconds for a new file to be seen by other hosts


class Exchanging(Ranks, Protocol):
    """Ranks that also send bytes around the ring."""

    def exchange(self, sent: Any, received: Any) -> float:
        """Send bytes to the next rank and receive as many from the one before.

        Collective: every rank calls this.

        Parameters
        ----------
        sent, received : array of uint8 or None
            None: this rank does not send, or the one before it does not.

        Returns
        -------
        float
            Seconds until they were received.
        """

    def watching(self, what: str) -> AbstractContextManager[None]:
        """Limit a wait, and name what is awaited."""


@dataclass(frozen=True)
class Link:
    """What a rank received from the rank before it.

    Attributes
    ----------
    source, rank : int
    whole : bool
        Whether every byte arrived as sent.
    latency : float
        Seconds for a message of one byte.
    bandwidth : float
        Bytes per second for messages of 4 MiB.
    """

    source: int
    rank: int
    whole: bool
    latency: float
    bandwidth: float


def measure_links(ranks: Exchanging) -> list[Link]:
    """Send small and large messages around the ring, and time what each rank receives.

    Collective: every rank calls this.  Small ones are sent by all ranks at once, large ones by
    every second rank in turn: a slow link would delay the acknowledgements of the other direction.
    """
    left = (ranks.rank - 1) % ranks.size
    whole, best = True, {}
    for size, (rounds, messages) in _ROUNDS.items():
        sent, received = np.full(size, ranks.rank % 251, np.uint8), np.full(size, 255, np.uint8)
        began, times = time.perf_counter(), []
        with ranks.watching(f"a message of {size:,} bytes from rank {left}"):
            ranks.exchange(sent, received)  # makes the connection
        whole = whole and bool((received == left % 251).all())
        for _ in range(rounds):
            for turn in {_SMALL: (None,), LARGE: (0, 1)}[size]:
                give, take = (
                    x if turn is None or rank % 2 == turn else None
                    for x, rank in ((sent, ranks.rank), (received, left))
                )
                ranks.start_together()
                with ranks.watching(f"messages of {size:,} bytes from rank {left}"):
                    took = sum(ranks.exchange(give, take) for _ in range(messages))
                if take is not None:
                    times.append(took / messages)
            if max(ranks.allgather(time.perf_counter() - began)) > _BUDGET:
                break
        best[size] = max(min(times), 1e-9)
    return ranks.allgather(Link(left, ranks.rank, whole, best[_SMALL], LARGE / best[LARGE]))


def faster(first: Sequence[Link], second: Sequence[Link]) -> list[Link]:
    """Return the better of two measurements of each link."""
    return [
        Link(
            a.source,
            a.rank,
            a.whole and b.whole,
            min(a.latency, b.latency),
            max(a.bandwidth, b.bandwidth),
        )
        for a, b in zip(first, second, strict=True)
    ]


def clocks_of_hosts(ranks: Exchanging, hosts: Sequence[str]) -> dict[str, Clock]:
    """Return each host's clock beside that of rank 0's.

    Collective: every rank calls this.

    Parameters
    ----------
    ranks : Exchanging
    hosts : sequence of str
        Of all ranks.
    """
    clocks = {}
    # One after another, so that no wait grows with the number of hosts.
    for host in dict.fromkeys(hosts):
        if host != hosts[0]:
            with ranks.watching(f"{host}'s clock to be compared"):
                _, clocks[host] = compare_clocks(ranks, lambda: time.time(), [hosts.index(host)])
    return clocks


def sees_folder(ranks: Ranks) -> list[bool]:
    """Return for each rank whether it sees a file of rank 0's current folder in its own.

    Collective: every rank calls this.

    Returns
    -------
    list of bool
        Empty if rank 0 may not write there.
    """
    file = None
    if ranks.rank == 0:
        with suppress(OSError):
            file = NamedTemporaryFile(dir=".", prefix=".lvxattn-doctor-")  # noqa: SIM115
    try:
        name = ranks.allgather(Path(file.name).name if file else "")[0]
        return ranks.allgather(_appears(name)) if name else []
    finally:
        if file:
            with suppress(OSError):  # its folder may be gone
                file.close()


def _appears(name: str) -> bool:
    limit = time.monotonic() + _APPEARS
    while not os.path.exists(name):  # Path.exists raises where a folder is closed
        if time.monotonic() > limit:
            return False
        with suppress(OSError):
            os.listdir()  # a network file system may remember what was not there
        time.sleep(0.05)
    return True

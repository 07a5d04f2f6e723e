"""Every rank's clock, compared with rank 0's.

    rank 0   start --ask-->          <--reading-- end        offset = reading - (start + end) / 2
    rank r                 reading                           wrong by at most (end - start) / 2

Of many round trips the shortest says most, for the reading was made somewhere within it.  Clocks
drift, so what lies between two comparisons is interpolated (`plan.trace.Clock`).
"""

from time import perf_counter

from lvxattn.cli.ranks import Ranks
from lvxattn.plan.trace import Clock

# Of the round trips with one rank: at least so many, at most so many, and then for so many seconds.
FEWEST, MOST, SECONDS = 20, 200, 0.1
_ASK, _ENOUGH = 1.0, 0.0


def compare_clocks(ranks: Ranks) -> list[Clock]:
    """Compare all ranks' `perf_counter` with rank 0's.  Collective: every rank calls this.

    Parameters
    ----------
    ranks : Ranks

    Returns
    -------
    list of Clock
        In rank order; the same on all ranks.
    """
    clocks = [Clock(at=perf_counter())]
    with ranks.watching("all ranks to compare their clocks"):
        if ranks.rank == 0:
            clocks += [_asked(ranks, rank) for rank in range(1, ranks.size)]
            for rank in range(1, ranks.size):
                ranks.send(_ENOUGH, rank)
        else:
            # Until all are done: a rank that went on to a collective would spin, and take the core
            # of one that is asked.
            while ranks.receive(0) == _ASK:
                ranks.send(perf_counter(), 0)
        return ranks.allgather(clocks)[0]


def _asked(ranks: Ranks, rank: int) -> Clock:
    """Return another rank's clock, by the shortest of many round trips."""
    found: list[Clock] = []
    began = perf_counter()
    while len(found) < FEWEST or (len(found) < MOST and perf_counter() - began < SECONDS):
        start = perf_counter()
        ranks.send(_ASK, rank)
        reading = ranks.receive(rank)
        end = perf_counter()
        found.append(Clock(reading - (start + end) / 2, (end - start) / 2, reading))
    return min(found, key=lambda clock: clock.accuracy)

"""What the check needs of the ranks that there are."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lvxattn.check.ranks.outcome import Outcome

Array = npt.NDArray[np.float64]

# together(work): do this rank's work; raises if any rank's raised.
Together = Callable[[Callable[[], Any]], Any]
# task(comm, rank, together): what one rank does, over a communicator of the ranks that do it.
Task = Callable[[Any, int, Together], dict[str, Array]]


class Ranks(Protocol):
    """Ranks that can be given a task.

    Attributes
    ----------
    rank, size : int
        Of this process: rank 0 judges.
    device : str or None
        Where this rank's arrays are to be, if that is not the same for all ranks.
    stuck : bool
        A task did not come back on some rank: nothing else can be run.
    """

    rank: int
    size: int
    device: str | None
    stuck: bool

    def agree(self, what: tuple[Any, ...]) -> None:
        """Make sure that all ranks were called alike.

        Collective: every rank calls this.

        Raises
        ------
        ValueError
            They were not; the same on all ranks.
        """

    def run(self, P: int, task: Task) -> list[Outcome]:
        """Run a task on the first P ranks, each within the time limit.

        Collective: every rank calls this, whether it takes part or not.

        Returns
        -------
        list of Outcome
            On rank 0, one of each of the P ranks; elsewhere empty.
        """

    def end(self) -> None:
        """End all ranks, whatever they do, with status 1.  Does not return."""

    def close(self) -> None:
        """Give back what the ranks hold.

        Collective: every rank calls this, when nothing is stuck.
        """

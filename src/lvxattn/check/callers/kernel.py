"""A function with its options, as a process calls it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy.typing as npt

from lvxattn.check.call_kernel import LastResults, backward_of, call_kernel
from lvxattn.check.case_arrays import Problem
from lvxattn.check.frameworks import Framework
from lvxattn.check.ranks import RanksCaller, VirtualRanks
from lvxattn.check.shards import Cut
from lvxattn.check.surroundings import call_watched

Array = npt.NDArray[Any]


class Kernel:
    """A function, its options, and the results of its last call.

    Parameters
    ----------
    fn : callable
    framework : Framework
    backward : bool or callable
        As `check` takes it.
    seconds : float
        The time limit of a call on virtual ranks.
    ranks : int
        Number of virtual ranks; 0 for a function of one process.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        framework: Framework,
        backward: Any,
        seconds: float,
        ranks: int,
    ) -> None:
        own, gradients = backward_of(fn, backward), backward is not False
        self.own_backward = own is not None
        self._framework, self._last = framework, LastResults()
        self._team = VirtualRanks(ranks, seconds) if ranks else None
        self._solve: Callable[..., dict[str, Array]] = (
            RanksCaller(fn, framework, own, gradients, self._team).call
            if self._team
            else partial(
                call_kernel, fn, framework=framework, backward=own, gradients=gradients,
                last=self._last,
            )
        )  # fmt: skip

    def call(
        self, problem: Problem, notes: list[str] | None = None, cut: Cut | None = None
    ) -> dict[str, Array]:
        """Call the function; `call_kernel` and `call_watched` document results and errors.

        Parameters
        ----------
        problem : Problem
        notes : list of str, optional
            Receives the reason if there are no gradients.
        cut : Cut, optional
            Of the problem, for virtual ranks.
        """
        options = {} if cut is None else {"cut": cut}
        return call_watched(lambda: self._solve(problem, notes=notes, **options))

    def look_back(self) -> None:
        """Raise a ContractError if the function has changed its last results."""
        with self._framework.active():
            self._last.look_back()

    def close(self) -> None:
        """End the threads of virtual ranks."""
        if self._team:
            self._team.close()

"""Call a distributed function on ranks, with the parts of a problem."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from lvxattn.check.call_kernel import call_kernel
from lvxattn.check.case_arrays import Problem
from lvxattn.check.frameworks import Framework
from lvxattn.check.one_call import Together
from lvxattn.check.ranks.tasks import Ranks, joined
from lvxattn.check.shards import Cut

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RanksCaller:
    """A function, and the ranks that call it."""

    fn: Callable[..., Any]
    framework: Framework
    backward: Callable[..., Any] | None
    gradients: bool
    ranks: Ranks

    def call(
        self, problem: Problem, notes: list[str] | None = None, *, cut: Cut
    ) -> dict[str, Array]:
        """Call the function on the parts of a problem; return the joined results on rank 0.

        Collective: every rank calls this.

        Raises
        ------
        ContractError, NotImplementedError
            On rank 0, for any failure on the ranks.
        """

        def task(
            comm: Any, rank: int, together: Together
        ) -> tuple[dict[str, Array], Sequence[str]]:
            reasons: list[str] = []

            def with_comm(fn: Callable[..., Any]) -> Callable[..., Any]:
                return lambda *arrays, **options: fn(*arrays, comm, **options)

            results = call_kernel(
                with_comm(self.fn),
                problem,
                self.framework,
                backward=None if self.backward is None else with_comm(self.backward),
                gradients=self.gradients,
                notes=reasons,
                part=lambda problem: cut.part(problem, rank),
                together=together,
                on_ranks=True,
            )
            return results, reasons

        outcomes = self.ranks.run(cut.group, task)
        if not outcomes:
            return {}
        results = joined(outcomes, self.ranks.time_limit)
        if notes is not None:
            notes += outcomes[0].notes
        return results

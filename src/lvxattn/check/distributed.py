"""Run a suite of cases on a function whose queries and keys are spread over ranks.

    rank 0     its shards --> fn --+
    rank 1     its shards --> fn --+--> the whole results --> rank 0 judges
    rank 2     its shards --> fn --+

The truth and the limit are those of the whole problem: neither knows of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy.typing as npt

from lvxattn.check.call_kernel import call_kernel
from lvxattn.check.cases import Case, suite_of
from lvxattn.check.diagnosis import Suspects
from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.growth import GROWTH, growth_cuts, judged_growth
from lvxattn.check.problem import Problem, draw
from lvxattn.check.ranks import Ranks, Together, joined, launched_by_torchrun, ranks_of
from lvxattn.check.report import Report, Row
from lvxattn.check.shards import Cut, sweep_of
from lvxattn.check.suite import (
    check_arguments,
    judged,
    name_of,
    notes_of,
    wanted_dtypes,
)

Array = npt.NDArray[Any]


def check_distributed(
    fn: Callable[..., Any],
    *,
    suite: str = "quick",
    dtypes: Sequence[str] | None = None,
    backward: bool | Callable[..., Any] = True,
    framework: str | None = None,
    device: str | None = None,
    seeds: int = 1,
    time_limit: float = 30.0,
    ranks: int | None = None,
    told: Callable[[Report], Any] | None = None,
) -> Report | None:
    """Hold a distributed attention function against the reference.

    Collective: every rank calls this, with the same arguments, under mpiexec or torchrun; or one
    process, with a number of virtual ranks.

    Every case is run with even cuts on all P ranks, with even cuts on fewer ranks, and with uneven
    cuts.  The quick suite takes turns: each case sees one smaller number of ranks and an uneven
    cut (`shards.Cut` has the kinds), each group of cases every kind of cut, and the next dtype or
    seed goes on where the last one stopped.  The full suite takes every number of ranks with even
    cuts and every kind of cut with some number of ranks.  Numbers of ranks are 1 to 8, then powers
    of two and P.  Last comes what shows whether errors grow with P (`growth`).

    A function that raises on one rank while others wait for it leaves them there.  They are given
    up after the time limit, and so is the rest of the check: rank 0 prints the report so far and
    every process ends with status 1.

    Parameters
    ----------
    fn : callable
        ``fn(q, k, v, comm, *, scale, mask) -> out`` or ``(out, lse)`` of this rank's queries:
        q (B, H, s_q, D), k (B, H_KV, s_kv, D), v (B, H_KV, s_kv, D_V), lengths of any size, 0
        included; comm an ``MPI.Intracomm``, a torch process group or a
        `lvxattn.reference.VirtualComm`; mask None, an array with all S_Q queries, or an axis of 1,
        and this rank's keys, or a callable of global indices.  The rest is as `check` has it.
    suite, dtypes, device, seeds
        As `check` has them; ``"cuda"`` is a GPU for each rank.
    backward : bool or callable
        Whether to check gradients: by ``fn.backward(dout, q, k, v, out, lse, comm, *, scale, mask)
        -> (dq, dk, dv)``, or this function of the same arguments, or else by autograd.
    framework : str, optional
        ``"torch"`` under torchrun, otherwise ``"numpy"``, unless given.
    time_limit : float
        Seconds that a case may take.
    ranks : int, optional
        Check on that many virtual ranks, threads of this process, instead of the launcher's.
    told : callable, optional
        What rank 0 does with the report so far before all processes end because ranks did not come
        back; it is printed unless given.

    Returns
    -------
    Report or None
        On rank 0; None elsewhere.

    Raises
    ------
    TypeError, ValueError, ModuleNotFoundError, RuntimeError
        Naming the argument, what was expected and what was given; what fn does wrong is in the
        report instead.
    """
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int)):
        raise TypeError(f"ranks: expected a number of virtual ranks or None, got {ranks!r:.40}")
    if framework is None and ranks is None and launched_by_torchrun():
        framework = "torch"
    arrays = framework_of(framework, device)
    check_arguments(fn, suite, backward, seeds, time_limit)
    team = ranks_of(ranks, time_limit, device)
    if team.device != device and team.device is not None:
        arrays = framework_of(framework, team.device)
    wanted = wanted_dtypes(dtypes, suite, arrays)
    chosen = tuple(dtype for dtype in wanted if dtype in arrays.dtypes)
    target = name_of(fn)
    team.agree((target, suite, chosen, backward is not False, seeds, time_limit, arrays.name))

    own = backward if callable(backward) else getattr(fn, "backward", None)
    rows: list[Row] = []
    cases: dict[str, Case] = {}
    start, suspects = perf_counter(), Suspects()

    def report(*notes: str, diagnosed: bool = True) -> Report:
        found, probably = tuple(rows), ""
        if diagnosed:
            found, probably = suspects.conclude(rows, cases)
        ranked = f"{team.size} {'rank' if team.size == 1 else 'ranks'}"
        said = (ranked, *notes_of(arrays, rows, wanted), *notes)
        seconds = perf_counter() - start
        return Report(target, suite, arrays.name, found, seconds, notes=said, probably=probably)

    for case, dtype, seed, cut in _trials(suite, chosen, seeds, team.size):
        player = DistributedPlayer(
            fn, arrays, own, backward is not False, team, cut, time_limit
        )  # fmt: skip
        if team.rank:
            player.play(draw(case, dtype, seed))
            continue
        cases[case.name] = case
        rows.append(judged(player, case, dtype, seed, suspects, str(cut)))
        if team.stuck:
            # Without a diagnosis, which takes its time: the others are about to end.
            so_far = report("the rest was not run: ranks did not come back", diagnosed=False)
            (told or print)(so_far)
            team.end()
    team.close()
    if team.rank:
        return None
    found, notes = judged_growth(rows, chosen, team.size)
    finished = report(*notes)
    return replace(finished, rows=(*finished.rows, *found))


def _trials(
    suite: str, dtypes: Sequence[str], seeds: int, size: int
) -> Iterator[tuple[Case, str, int, Cut]]:
    cases = suite_of(suite)
    variants = [(dtype, seed) for dtype in dtypes for seed in range(seeds)]
    sweeps = [sweep_of(cases, size, suite, turn) for turn in range(len(variants))]
    for case in cases:
        for (dtype, seed), sweep in zip(variants, sweeps, strict=True):
            for cut in sweep[case.name]:
                yield case, dtype, seed, cut
    for dtype, seed in variants:
        for cut in growth_cuts(dtype, size):
            yield GROWTH, dtype, seed, cut


@dataclass(frozen=True)
class DistributedPlayer:
    """A function, the ranks that call it, and how the problem is cut for them."""

    fn: Callable[..., Any]
    framework: Framework
    backward: Callable[..., Any] | None
    gradients: bool
    ranks: Ranks
    cut: Cut
    time_limit: float

    def play(self, problem: Problem, notes: list[str] | None = None) -> dict[str, Array]:
        """Call the function; the whole results are on rank 0, nothing elsewhere.

        Collective: every rank calls this.

        Raises
        ------
        ComplaintError, NotImplementedError
            On rank 0, for whatever happened on the ranks.
        """

        def task(comm: Any, rank: int, together: Together) -> dict[str, Array]:
            def with_comm(fn: Callable[..., Any]) -> Callable[..., Any]:
                return lambda *arrays, **options: fn(*arrays, comm, **options)

            return call_kernel(
                with_comm(self.fn),
                problem,
                self.framework,
                backward=None if self.backward is None else with_comm(self.backward),
                gradients=self.gradients,
                notes=None if rank else notes,
                part=lambda whole: self.cut.part(whole, rank),
                together=together,
            )

        outcomes = self.ranks.run(self.cut.P, task)
        return joined(outcomes, self.time_limit) if outcomes else {}

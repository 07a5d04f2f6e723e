"""Run a suite of cases on a function whose queries and keys are distributed over ranks.

    rank 0     its shards --> fn --+
    rank 1     its shards --> fn --+--> the joined results --> rank 0 judges
    rank 2     its shards --> fn --+

Truth and limit are those of the unsharded problem: neither depends on ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

from lvxattn.check.call_kernel import backward_of
from lvxattn.check.callers import process_of
from lvxattn.check.case_arrays import draw
from lvxattn.check.cases import Case, suite_of
from lvxattn.check.check_arguments import check_arguments, wanted_dtypes
from lvxattn.check.check_notes import notes_of
from lvxattn.check.check_report import Report, Row
from lvxattn.check.dependence import condition, simpler_on_ranks, smallest
from lvxattn.check.dependence import described as size_text
from lvxattn.check.diagnosis import Suspects
from lvxattn.check.frameworks import framework_of
from lvxattn.check.growth import growth_case, growth_cuts, judged_growth
from lvxattn.check.import_target import load, name_of
from lvxattn.check.ranks import Ranks, RanksCaller, launched_by_torchrun, ranks_of
from lvxattn.check.shards import CUTS, KINDS, Cut
from lvxattn.check.suite import judged, size_of
from lvxattn.check.sweep import described, sweep_of


def check_distributed(
    fn: Callable[..., Any] | str,
    *,
    suite: str = "quick",
    dtypes: Sequence[str] | None = None,
    backward: bool | Callable[..., Any] | str = True,
    framework: str | None = None,
    device: str | None = None,
    seeds: int = 1,
    time_limit: float = 30.0,
    ranks: int | None = None,
    cases: Sequence[Case] | None = None,
    cuts: Sequence[str] = CUTS,
    report_early: Callable[[Report], Any] = print,
) -> Report | None:
    """Check a distributed attention function against the reference.

    Collective: every rank calls this, with the same arguments, under mpiexec or torchrun; or one
    process, with a number of virtual ranks.

    Every case is run with even cuts on all P ranks, on fewer ranks, and with uneven cuts.  The
    groups that the function gets are also others than the launcher's first ranks: its last ones,
    every other one, or ranks in reverse order, unless an older PyTorch sorts them; virtual ranks
    have no others.  Numbers of ranks are 1 to 8, then powers of two and P.

    Pairs of these are covered.  In the quick suite each group of cases gets every kind of cut and
    of group, and masks their pairs; in the full suite each case also every number of ranks, and
    each size, mask, memory layout and scale of the combinations every one of these (`sweep`).  The
    next dtype or seed takes others that are equally good.  Last comes the case that shows whether
    errors grow with P (`growth`).

    If a function raises on one rank, other ranks may wait for it.  They are abandoned after the
    time limit, and so is the rest of the check: rank 0 prints the report so far and every process
    ends with status 1.

    Parameters
    ----------
    fn : callable or str
        ``fn(q, k, v, comm, *, scale, mask) -> out`` or ``(out, lse)`` of this rank's queries:
        q (B, H, s_q, D), k (B, H_KV, s_kv, D), v (B, H_KV, s_kv, D_V), lengths of any size, 0
        included; comm an ``MPI.Intracomm``, a torch process group or a
        `lvxattn.reference.VirtualComm`; mask None, an array with all S_Q queries, or an axis of 1,
        and this rank's keys, or a callable of global indices.  The rest is as in `check`.  Virtual
        ranks are threads of a process of their own, if `check` had one for the function.
    suite, dtypes, device, seeds
        As in `check`; ``"cuda"`` means a GPU for each rank.
    backward : bool, callable or str
        Whether to check gradients: by ``fn.backward(dout, q, k, v, out, lse, comm, *, scale, mask)
        -> (dq, dk, dv)``, or this function of the same arguments, or else by autograd.
    framework : str, optional
        Default: ``"torch"`` under torchrun, otherwise ``"numpy"``.
    time_limit : float
        Seconds per case.
    ranks : int, optional
        Number of virtual ranks; default: the launcher's ranks.
    cases : sequence of Case, optional
        Cases to run instead of a suite.
    cuts : sequence of str
        Of ``"even"`` (as far as lengths divide), ``"ragged"``, ``"first"``, ``"last"``
        (`shards.Cut` has their meaning) and ``"divisible"``: parts of equal length, in cases whose
        lengths are raised to multiples of the number of ranks; ``cuts=["divisible"]`` is for
        functions that take nothing else.  Default: all others.
    report_early : callable, optional
        Called on rank 0 with the report so far if all processes are about to end because ranks did
        not return; default: print it.

    Returns
    -------
    Report or None
        On rank 0; None elsewhere.

    Raises
    ------
    TypeError, ValueError, ModuleNotFoundError, RuntimeError
        Naming the argument, what was expected and what was given.  Errors of fn are part of the
        report instead.

    Examples
    --------
    >>> from lvxattn.check import case_of, check_distributed
    >>> from lvxattn.reference import cross_attention
    >>> options = {"ranks": 2, "dtypes": ["float64"], "cases": [case_of("gaussian")]}
    >>> report = check_distributed(cross_attention, **options)
    >>> report.passed, [row.where for row in report.rows]
    (True, ['P=2, even', 'P=1, even', 'P=2, ragged', 'P=2, first', 'P=2, last'])
    >>> report = check_distributed(cross_attention, **options, cuts=["divisible"])
    >>> [(row.case, row.where) for row in report.rows]
    [('gaussian', 'P=2, divisible'), ('gaussian', 'P=1, divisible')]
    """
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int)):
        raise TypeError(f"ranks: expected a number of virtual ranks or None, got {ranks!r:.40}")
    if framework is None and ranks is None and launched_by_torchrun():
        framework = "torch"
    arrays = framework_of(framework, device)
    check_arguments(fn, suite, backward, seeds, time_limit, cases)
    cuts = _kinds(cuts)
    team = ranks_of(ranks, time_limit, device)
    if team.device != device and team.device is not None:
        arrays = framework_of(framework, team.device)
    wanted = wanted_dtypes(dtypes, suite, arrays)
    chosen = arrays.chosen = tuple(dtype for dtype in wanted if dtype in arrays.dtypes)
    target = fn if isinstance(fn, str) else name_of(fn)
    names = [case.name for case in cases or ()]
    gradients = backward is not False
    options = (target, suite, chosen, gradients, seeds, time_limit, arrays.name, names)
    team.agree((*options, cuts, team.groups))

    process = None
    if ranks is None:
        here: Any = load(fn, "fn") if isinstance(fn, str) else fn
        named = load(backward, "backward") if isinstance(backward, str) else backward
        call = RanksCaller(here, arrays, backward_of(here, named), gradients, team).call
    else:
        process = process_of(fn, arrays, backward, time_limit, ranks)
        call = process.call
    rows: list[Row] = []
    selected = suite_of(suite) if cases is None else cases
    trials = list(_trials(selected, suite, chosen, seeds, cuts, team))
    by_name = {case.name: case for case, *_ in trials}
    where = {str(cut): described(cut, team.size) for cut in {cut for *_, cut in trials}}
    start, suspects = perf_counter(), Suspects({str(cut): cut for *_, cut in trials})

    def report(*notes: str, diagnosed: bool = True) -> Report:
        found, probably = tuple(rows), ""
        if diagnosed:
            found, probably = suspects.conclude(rows, by_name)
            tried = [row for row in rows if row.status != "unsupported"]
            failed = [(by_name[r.case], r.dtype, r.status != "ok") for r in tried]
            depends = condition(failed, [where[row.where] for row in tried])
            notes = (*([depends] if depends else []), *notes)
        ranked = f"{team.size} {'rank' if team.size == 1 else 'ranks'}"
        remarks = (ranked, *notes_of(arrays, rows, wanted), *notes)
        seconds = perf_counter() - start
        return Report(target, suite, arrays.name, found, seconds, notes=remarks, probably=probably)

    stuck = "the rest was not run: ranks did not come back"
    with closing(process) if process else nullcontext():
        for case, dtype, seed, cut in trials:
            if team.rank:
                call(draw(case, dtype, seed), cut=cut)
                continue
            rows.append(judged(partial(call, cut=cut), case, dtype, seed, suspects, str(cut)))
            if team.stuck:
                # Without a diagnosis, which takes its time: the others are about to end.
                report_early(report(stuck, diagnosed=False))
                team.end()
        if team.rank:
            while trial := team.share(None):
                case, dtype, seed, cut = trial
                call(draw(case, dtype, seed), cut=cut)
        else:
            found, notes = judged_growth(rows, chosen, team.size)
            finished = report(*notes)
            finished = replace(finished, rows=(*finished.rows, *found))

            def end() -> None:
                report_early(finished)
                team.end()

            cuts_of = {str(cut): cut for *_, cut in trials}
            least = _smallest(call, team, rows, by_name, cuts_of, end)
            team.share(None)
    team.close()
    if team.rank:
        return None
    more = [text for text in (least, process.ending if process else "") if text]
    return replace(finished, notes=(*finished.notes, *more))


def _smallest(
    call: Callable[..., Any],
    team: Ranks,
    rows: Sequence[Row],
    cases: Mapping[str, Case],
    cuts: Mapping[str, Cut],
    end: Callable[[], None],
) -> str:
    """Return the smallest problem with a wrong result; call end if ranks do not come back."""
    wrong = [row for row in rows if row.status == "wrong"]
    if not wrong:
        return ""
    first = min(wrong, key=lambda row: (cuts[row.where].P, size_of(cases[row.case])))

    def fails(trial: tuple[Case, Cut]) -> bool:
        case, cut = trial
        try:
            draw(case, first.dtype, first.seed)
        except ValueError:  # its mask needs more queries
            return False
        team.share((case, first.dtype, first.seed, cut))
        row = judged(partial(call, cut=cut), case, first.dtype, first.seed)
        if team.stuck:
            end()
        return row.status == "wrong"

    (case, cut), _ = smallest((cases[first.case], cuts[first.where]), fails, simpler_on_ranks)
    return f"smallest that fails, from {first.case} in {first.dtype}: {cut}: {size_text(case)}"


def _kinds(cuts: Any) -> tuple[str, ...]:
    """Return the kinds of cuts, each once; raise unless there are some, and all are known."""
    expected = f"cuts: expected a sequence of {', '.join(KINDS)}"
    if isinstance(cuts, str) or not isinstance(cuts, Iterable):
        raise TypeError(f"{expected}, got {cuts!r:.40}")
    given = tuple(cuts)
    wrong = [kind for kind in given if kind not in KINDS]
    if wrong or not given:
        raise ValueError(f"{expected}, got {f'{wrong[0]!r:.40}' if wrong else 'none'}")
    return tuple(dict.fromkeys(given))


def _trials(
    cases: Sequence[Case],
    suite: str,
    dtypes: Sequence[str],
    seeds: int,
    cuts: Sequence[str],
    team: Ranks,
) -> Iterator[tuple[Case, str, int, Cut]]:
    variants = [(dtype, seed) for dtype in dtypes for seed in range(seeds)]
    sweeps = [
        sweep_of(cases, team.size, suite, turn, cuts, team.groups) for turn in range(len(variants))
    ]
    for case in cases:
        for (dtype, seed), sweep in zip(variants, sweeps, strict=True):
            for cut in sweep[case.name]:
                yield cut.fitted(case), dtype, seed, cut
    for dtype, seed in variants:
        for cut in growth_cuts(dtype, team.size):
            yield growth_case(team.size), dtype, seed, cut

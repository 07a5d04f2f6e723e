"""One case: everything about it, and its tensors in a file."""

from argparse import Namespace
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.cases import Case, case_of
from lvxattn.check.command.arguments import framework_in, functions_in, look_at_file
from lvxattn.check.command.listing import shapes_of
from lvxattn.check.files import inputs_of, mask_text, write_tensors
from lvxattn.check.judge import truth_for
from lvxattn.check.problem import Problem, draw
from lvxattn.check.report import Report, Row
from lvxattn.check.single import diagnosed
from lvxattn.check.suite import Player
from lvxattn.check.time_limit import TimeLimit
from lvxattn.cli.arguments import UsageError

Array = npt.NDArray[Any]

_COLUMNS = ("error", "limit", "ratio", "max abs", "ulps", "flash")


@dataclass(frozen=True)
class _Recorder(Player):
    """Keeps what the function returned last."""

    kept: dict[str, Array] = field(default_factory=dict)

    def play(self, problem: Problem, *args: Any, **kwargs: Any) -> dict[str, Array]:
        self.kept.clear()
        self.kept.update(super().play(problem, *args, **kwargs))
        return dict(self.kept)


def replay(options: Namespace) -> int:
    """Run one case, or only draw it, where there is no function.

    Returns
    -------
    int
        0, or 1 if it failed.

    Raises
    ------
    UsageError
    """
    try:
        case = case_of(options.case)
    except ValueError as error:
        raise UsageError(f"--{error}") from None  # it begins with case:
    arrays = framework_in(options)
    chosen = options.dtypes or arrays.usual
    if options.save is not None and len(chosen) > 1:
        raise UsageError(f"--save: expected --dtypes with one dtype, got {', '.join(chosen)}")
    look_at_file(options.save, "--save")
    look_at_file(options.json, "--json")
    player = None
    if options.function is not None:
        fn, backward = functions_in(options)
        own = backward if callable(backward) else getattr(fn, "backward", None)
        patience = TimeLimit(options.time_limit or 30.0)
        player = _Recorder(fn, arrays, own, backward is not False, patience)

    seed = options.seed or 0
    start, rows = perf_counter(), []
    for dtype in chosen:
        row = diagnosed(player, case, dtype, seed) if player else None
        rows += [row] if row else []
        problem = draw(case, dtype, seed)
        if not options.quiet:
            print(_about(case, problem, row), flush=True)
        if options.save is not None:
            _save(options.save, problem, player.kept if player else {})
    if player is None:
        return 0
    player.patience.close()
    report = Report(options.function, "one case", arrays.name, tuple(rows), perf_counter() - start)
    if options.json:
        report.to_json(options.json)
    return 0 if report.passed else 1


def _about(case: Case, problem: Problem, row: Row | None) -> str:
    """Return all that is known of one row."""
    mask = case.mask if isinstance(problem.mask, type(None) | np.ndarray) else mask_text(problem)
    lines = [
        f"{case.name}, {problem.dtype}, seed {problem.seed}: {case.reason}",
        f"  {shapes_of(case)}, scale {problem.scale:.6g}, memory {case.memory}"
        + (f", before it: {case.calls}" if case.calls else ""),
        f"  mask: {mask}".replace("\n", "\n    "),
    ]
    if row is None:
        return "\n".join(lines)
    lines.append(f"  {row.status}{f': {row.message}' if row.message else ''}")
    if row.verdicts:
        lines.append(f"  {'':5}" + "".join(f"{name:>10}" for name in _COLUMNS))
    for v in row.verdicts:
        numbers = (v.error, v.limit, v.ratio, v.max_abs, v.ulps, v.flash)
        said = f"  {v.what}" if v.what else ""
        cells = "".join(f"{number:>10.2g}" for number in numbers)
        worst = f"worst at {v.index}: got {v.got:.9g}, expected {v.expected:.9g}"
        lines.append(f"  {v.name:5}{cells}  {worst}{said}")
    if row.diagnosis:
        lines.append(f"  {row.diagnosis}")
    return "\n".join(lines)


def _save(path: str, problem: Problem, got: dict[str, Array]) -> None:
    truth = truth_for(problem.case, problem.dtype, problem.seed)
    arrays = {
        **inputs_of(problem),
        **truth.results,
        **{f"got_{name}": x for name, x in got.items()},
    }
    notes = {
        "case": problem.case.name,
        "reason": problem.case.reason,
        "seed": str(problem.seed),
        "dtype": problem.dtype,
        "scale": repr(problem.scale),
        "mask": mask_text(problem),
        "tensors": "q, k, v, mask, dout: as the function gets them; out, lse, dq, dk, dv: what is "
        "right, in float64; got_...: what the function returned, in float64",
    }
    try:
        write_tensors(path, arrays, notes)
    except OSError as error:
        raise UsageError(f"--save: {path} cannot be written: {error.strerror}") from None

"""Cross-attention on the ranks of a run, measured, checked and reported.

Every rank takes its share of the queries and of the keys, and what comes out is written where it
lies in the whole: no rank ever holds all of anything.
"""

import os
import socket
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, cast

from lvxattn.cli.arguments import try_to_write
from lvxattn.cli.check import Check, check_results
from lvxattn.cli.problem import Problem, Share, describe, take_share
from lvxattn.cli.ranks import Backend, Ranks
from lvxattn.cli.report import Cost, Report, print_report, write_json
from lvxattn.cli.tensors import Array, InputError, Shape, TensorFile, create
from lvxattn.cli.tracing import Recorder, check_picture, save_trace
from lvxattn.common.validation import accumulator, raise_together
from lvxattn.plan.choose import Layout
from lvxattn.plan.machine import MACHINES, Machine, machine_of

T = TypeVar("T")

_OF_QUERIES = ("out", "lse", "dq")


def run_problem(options: Namespace, ranks: Ranks) -> bool:
    """Run what the command line asks for.  Collective: every rank calls this.

    Parameters
    ----------
    options : argparse.Namespace
        As `options.add_options` defines them.
    ranks : Ranks

    Returns
    -------
    bool
        Whether all checks passed; the same on all ranks.

    Raises
    ------
    InputError
        The problem cannot be worked on, or its result not be written; the same on all ranks.
    """
    threads = ranks.limit_threads()
    # 1. rank 0 looks at the problem; every rank takes its share of it
    _on_rank_0(lambda: _check_paths(options), ranks)
    _on_rank_0(lambda: check_picture(options), ranks)
    problem = _on_rank_0(lambda: describe(options), ranks)
    machine = _on_rank_0(lambda: _read_machine(options), ranks)
    backend = ranks.backend(options.device, problem.dtype)
    share = _together(lambda: take_share(problem, ranks.rank, ranks.size), ranks)
    tensors = {name: backend.put(x) for name, x in share.tensors.items()}
    layout = _agree(options, tensors, machine, backend)
    output = _on_rank_0(lambda: _create(options, problem, layout), ranks)
    try:
        # 2. the attention, as often as is asked for
        recorder = Recorder(options, ranks)
        results, costs = _measure(options, tensors, ranks, layout, backend, recorder)
        trace = recorder.trace()
        # 3. every rank writes its part
        if output is not None:
            _together(lambda: _write(output, share, results), ranks)
            _on_rank_0(lambda: os.replace(output.path, Path(options.output).resolve()), ranks)
    finally:
        if output is not None and ranks.rank == 0:
            Path(output.path).unlink(missing_ok=True)
    # 4. sampled rows against an independent softmax
    checks: list[Check] = []
    if options.check:
        scale, seed, gpu = layout.scale, options.seed, backend.device.startswith("GPU")
        checks = check_results(problem, share, results, ranks, scale=scale, seed=seed, gpu=gpu)
    # 5. rank 0 reports
    host = socket.gethostname()
    device, kernel = backend.device, backend.kernel(tensors)
    by_rank = ranks.allgather(
        [replace(cost, host=host, device=device, kernel=kernel, threads=threads) for cost in costs]
    )
    report = Report.of(options, problem, layout, by_rank, checks, trace)
    speaks = ranks.rank == 0 and not options.quiet and options.json != "-"
    if speaks:
        print_report(report, launched=ranks.launched)
    _on_rank_0(lambda: write_json(report, options.json) if options.json else None, ranks)
    if trace is not None:
        hosts = [costs[0].host for costs in by_rank]
        _on_rank_0(lambda: save_trace(options, trace, layout, hosts), ranks)
    written = [x for x in (options.output, options.json, options.trace, options.plot_trace) if x]
    if speaks and written:
        print("\n  written   " + "\n            ".join(written))
    return all(check.passed for check in checks)


def _read_machine(options: Namespace) -> Machine | None:
    """Return what the schedule is chosen for, if that is said."""
    try:
        return None if options.machine is None else machine_of(options.machine)
    except ValueError as error:
        raise InputError(f"--machine: {error}") from None


def _agree(
    options: Namespace, tensors: dict[str, Any], machine: Machine | None, backend: Backend
) -> Layout:
    try:
        return backend.agree(
            tensors, schedule=options.schedule, scale=options.scale, machine=machine
        )
    except (TypeError, ValueError) as error:  # the same on all ranks
        raise InputError(str(error)) from None


def _measure(
    options: Namespace,
    tensors: dict[str, Any],
    ranks: Ranks,
    layout: Layout,
    backend: Backend,
    recorder: Recorder,
) -> tuple[dict[str, Array], list[Cost]]:
    """Compute once, or a warm-up and as often as is asked for; return the last results."""
    costs = []
    often = 1 + (options.repeat or 0)
    for n in range(often):
        meter = recorder.meter(last=n == often - 1)
        ranks.start_together()
        meter.begins("forward")
        start = perf_counter()
        results = backend.forward(tensors, layout, meter)
        backend.finish()
        forward, backward = perf_counter() - start, 0.0
        if options.backward:
            ranks.start_together()
            meter.begins("backward")
            start = perf_counter()
            results |= backend.backward(tensors, results, layout, meter)
            backend.finish()
            backward = perf_counter() - start
        mine = layout.s_q[ranks.rank], layout.s_kv[ranks.rank]
        costs.append(Cost(*mine, forward, backward, meter.totals()))
    if options.repeat:
        costs = costs[1:]  # without the warm-up
    return {name: backend.get(x) for name, x in results.items()}, costs


def _check_paths(options: Namespace) -> None:
    """Refuse what would be found out, or overwritten, only after the work."""
    named = {
        "--input": options.input,
        "--machine": None if options.machine in MACHINES else options.machine,
        "--output": options.output,
        "--json": options.json,
        "--trace": options.trace,
        "--plot-trace": options.plot_trace,
    }
    seen: dict[Path, str] = {}
    for option, text in named.items():
        if text is None or (text == "-" and option == "--json"):
            continue
        path = Path(text).resolve()
        if path in seen:
            raise InputError(f"{option}: expected another file than {seen[path]}'s, got {text}")
        seen[path] = option
        if option in ("--input", "--machine"):
            continue
        if not path.parent.is_dir():
            raise InputError(f"{text}: there is no folder {path.parent}")
        if path.is_dir():
            raise InputError(f"{option}: expected a file, got the directory {text}")
        if option == "--output":  # `_create` makes it before the work
            continue
        try:
            try_to_write(path)
        except OSError as error:
            raise InputError(f"{option}: {text} cannot be written: {error.strerror}") from None


def _create(options: Namespace, problem: Problem, layout: Layout) -> TensorFile | None:
    """Make the output under a name of its own, so that a run cut short leaves no half of it."""
    if options.output is None:
        return None
    path = Path(options.output)
    if path.exists() and not path.is_file():
        raise InputError(f"{options.output}: expected a file, got a directory or a device")
    q, k, v = (problem.shapes[name] for name in "qkv")
    dtype = problem.dtype
    shapes: dict[str, tuple[str, Shape]] = {
        "out": (dtype, (*q[:3], v[3])),
        "lse": (accumulator(dtype), q[:3]),
    }
    if options.backward:
        shapes |= {"dq": (dtype, q), "dk": (dtype, k), "dv": (dtype, v)}
    notes = {"schedule": layout.schedule, "scale": repr(layout.scale)}
    try:
        return create(f"{path.resolve()}.part", shapes, notes)
    except OSError as error:
        Path(f"{path.resolve()}.part").unlink(missing_ok=True)
        raise InputError(f"{options.output}: {error.strerror}") from None


def _write(output: TensorFile, share: Share, results: dict[str, Array]) -> None:
    for name, x in results.items():
        output.write(name, 2, share.rows if name in _OF_QUERIES else share.keys, x)


def _on_rank_0(work: Callable[[], T], ranks: Ranks) -> T:
    """Do something on rank 0 and give all ranks the result, or its error."""
    mine = _together(lambda: work() if ranks.rank == 0 else None, ranks)
    return cast(T, ranks.allgather(mine)[0])


def _together(work: Callable[[], T], ranks: Ranks) -> T:
    """Do something on every rank; if one of them cannot, raise its error on all."""
    result, error = None, None
    try:
        result = work()
    except (InputError, OSError) as problem:
        text = str(problem)
        if isinstance(problem, OSError) and problem.filename:
            text = f"{problem.filename}: {problem.strerror}"  # without the number
        error = InputError(text)
    with ranks.watching("all ranks to read or write their parts"):
        raise_together(error, ranks)
    return cast(T, result)

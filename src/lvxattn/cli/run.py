"""The command ``run``: cross-attention on the ranks of a run, measured, checked and reported.

Every rank takes its share of the queries and of the keys, and writes its share of the results: no
rank ever holds all of anything.
"""

import socket
import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

from lvxattn.cli.arguments import UsageError, check_output, refuse
from lvxattn.cli.run_check import Check, check_results
from lvxattn.cli.run_options import contradiction
from lvxattn.cli.run_problem import Problem, Share, describe, least_nbytes, take_share
from lvxattn.cli.run_ranks import Backend, Ranks, check_room, on_rank_0, together
from lvxattn.cli.run_report import Cost, print_problem, print_report, report_of, write_json
from lvxattn.cli.run_trace import Recorder, check_picture, save_trace
from lvxattn.cli.tensors import Array, InputError, Shape, TensorFile, create
from lvxattn.common.handshake import grid_of
from lvxattn.common.new_file import naming, new_file
from lvxattn.common.regular_file import printable
from lvxattn.common.validation import accumulator
from lvxattn.plan.choose import Layout, named
from lvxattn.plan.machine import MACHINES, Machine, machine_of

_NAME = "lvxattn run"
_OF_QUERIES = ("out", "lse", "dq")


def run_command(options: Namespace, ranks: Ranks) -> int:
    """Run the command.  Collective: every rank calls this.

    Parameters
    ----------
    options : argparse.Namespace
        As defined by `run_options.add_options`.
    ranks : Ranks

    Returns
    -------
    int
        0, or 1 if a check failed, or 2 if the input is bad; the same on all ranks.

    Raises
    ------
    UsageError
        The arguments contradict each other; the same on all ranks.
    """
    wrong = contradiction(options)
    if wrong:
        raise UsageError(f"{_NAME}: error: {wrong} (on all ranks)")
    try:
        passed = _run(options, ranks)
    except InputError as error:
        return refuse(f"{_NAME}: error: {error}", ranks.rank)
    if not passed and ranks.rank == 0:
        print(f"{_NAME}: a check failed", file=sys.stderr, flush=True)
    return 0 if passed else 1


def _run(options: Namespace, ranks: Ranks) -> bool:
    """Return whether all checks passed; raise InputError on all ranks together."""
    threads = ranks.limit_threads()
    # 1. rank 0 reads the arguments; every rank takes its share of the problem
    on_rank_0(lambda: _check_paths(options), ranks)
    if options.input:
        _check_seen("--input", options.input, options.input, ranks)
    problem = on_rank_0(lambda: describe(options), ranks)
    on_rank_0(lambda: _check_grid(options, ranks.size), ranks)
    machine = on_rank_0(lambda: _read_machine(options), ranks)
    backend = ranks.backend(options.device, problem.dtype)
    speaks = ranks.rank == 0 and not options.quiet and options.json != "-"
    memory = check_room(
        least_nbytes(
            problem, options, ranks.rank, ranks.size, on_host=backend.device.startswith("CPU")
        ),
        ranks,
        "give fewer --frames, --visual-tokens or --text-tokens, or use more hosts",
    )  # fmt: skip
    share = together(lambda: take_share(problem, ranks.rank, ranks.size), ranks)
    tensors = {name: backend.put(x) for name, x in share.tensors.items()}
    try:
        layout = backend.agree(
            tensors, schedule=options.schedule, scale=options.scale, grid=options.grid,
            machine=machine,
        )  # fmt: skip
    except (TypeError, ValueError, MemoryError) as error:  # the same on all ranks
        raise InputError(str(error)) from None
    with ExitStack() as files:  # rank 0's new output, which becomes its own only when it is whole
        output = on_rank_0(lambda: _create(options, problem, layout, files), ranks)
        if output is not None:
            _check_seen("--output", options.output, output.path, ranks)
        if speaks:
            print_problem(problem, memory)
        # 2. the attention, with its repetitions
        recorder = Recorder(options, ranks)
        results, costs = _measure(options, tensors, ranks, layout, backend, recorder)
        trace = recorder.trace()
        # 3. every rank writes its part
        if output is not None:
            together(lambda: _write(options.output, output, share, results), ranks)
            on_rank_0(files.close, ranks)
    # 4. sampled rows against an independent softmax
    checks: list[Check] = []
    if options.check:
        scale, seed, gpu = layout.scale, options.seed, backend.device.startswith("GPU")
        checks = check_results(problem, share, results, ranks, scale=scale, seed=seed, gpu=gpu)
    # 5. rank 0 reports
    facts: dict[str, Any] = {
        "rank": ranks.rank,
        "host": socket.gethostname(),
        "device": backend.device,
        "kernel": backend.kernel(tensors),
        "threads": threads,
        "queries": layout.s_q[ranks.rank],
        "keys": layout.s_kv[ranks.rank],
        "share": layout.s_kv[ranks.rank] / max(1, layout.S_KV),
    }
    by_rank = ranks.allgather((facts, costs))
    report = report_of(options, problem, layout, by_rank, checks, trace)
    if speaks:
        print_report(report, launched=ranks.launched)
    on_rank_0(lambda: write_json(report, options.json) if options.json else None, ranks)
    if trace is not None:
        hosts = [facts["host"] for facts, _ in by_rank]
        on_rank_0(lambda: save_trace(options, trace, layout, hosts), ranks)
    written = [x for x in (options.output, options.json, options.trace, options.plot_trace) if x]
    if speaks and written:
        print("\n  written   " + "\n            ".join(map(printable, written)))
    return all(check.passed for check in checks)


def _check_paths(options: Namespace) -> None:
    """Refuse files that could not be written after the work, or would be overwritten by it."""
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
        if option not in ("--input", "--machine"):
            check_output(option, text)
    check_picture(options)


def _check_grid(options: Namespace, P: int) -> None:
    """Refuse a grid that is not one of these ranks."""
    try:
        grid_of(options.grid, options.schedule, P)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def _check_seen(option: str, given: str, path: str, ranks: Ranks) -> None:
    """Refuse a file that only some hosts see or, of an input, that has another size on some.

    Collective: every rank calls this.
    """
    try:
        size = Path(path).stat().st_size
    except OSError:
        size = -1
    if option == "--output":  # a network's file system may be late with the size
        size = min(size, 0)
    seen = ranks.allgather((socket.gethostname(), size))
    by_size: dict[int, list[str]] = {}
    for host, size in sorted({*seen}):
        by_size.setdefault(size, []).append(host)
    if len(by_size) == 1 or len({host for host, _ in seen}) == 1:
        return  # perhaps none sees it: what reads it says why
    hosts = {size: ", ".join(names) for size, names in by_size.items()}
    if lacking := hosts.pop(-1, ""):
        found = f"but {lacking} does not see what {'; '.join(hosts.values())} sees"
    else:
        found = "got " + ", ".join(f"{size:,} bytes on {names}" for size, names in hosts.items())
    raise InputError(
        f"{option}: {given}: expected one file that all hosts see, {found}: put it on a file "
        "system that they share (on all ranks)"
    )


def _read_machine(options: Namespace) -> Machine | None:
    """Return the machine for which the schedule is chosen, if there is one."""
    try:
        return None if options.machine is None else machine_of(options.machine)
    except ValueError as error:
        raise InputError(f"--machine: {error}") from None


def _measure(
    options: Namespace,
    tensors: dict[str, Any],
    ranks: Ranks,
    layout: Layout,
    backend: Backend,
    recorder: Recorder,
) -> tuple[dict[str, Array], list[Cost]]:
    """Compute once, or a warm-up and all repetitions; return the last results and all costs."""
    costs = []
    often = 1 + (options.repeat or 0)
    for n in range(often):
        meter = recorder.meter(last=n == often - 1)
        seconds = {"forward": 0.0, "backward": 0.0}
        for name in ("forward", *["backward"] * options.backward):
            ranks.start_together()
            meter.begins(name)
            start = perf_counter()
            if name == "forward":
                results = backend.forward(tensors, layout, meter)
            else:
                results |= backend.backward(tensors, results, layout, meter)
            backend.finish()
            seconds[name] = perf_counter() - start
        costs.append(Cost(**seconds, meter=meter.totals()))
    if options.repeat:
        costs = costs[1:]  # without the warm-up
    return {name: backend.get(x) for name, x in results.items()}, costs


def _create(
    options: Namespace, problem: Problem, layout: Layout, files: ExitStack
) -> TensorFile | None:
    """Create the output, of its final size, under a name that `files` changes when it is closed."""
    if options.output is None:
        return None
    q, k, v = (problem.shapes[name] for name in "qkv")
    dtype = problem.dtype
    shapes: dict[str, tuple[str, Shape]] = {
        "out": (dtype, (*q[:3], v[3])),
        "lse": (accumulator(dtype), q[:3]),
    }
    if options.backward:
        shapes |= {"dq": (dtype, q), "dk": (dtype, k), "dv": (dtype, v)}
    notes = {"schedule": named(layout.schedule, layout.grid), "scale": repr(layout.scale)}
    file = files.enter_context(new_file(options.output))
    with naming(options.output, file.name):
        return create(file, shapes, notes)


def _write(target: str, output: TensorFile, share: Share, results: dict[str, Array]) -> None:
    with naming(target, output.path):
        for name, x in results.items():
            output.write(name, 2, share.rows if name in _OF_QUERIES else share.keys, x)
        output.sync()  # rank 0 may be on another host, and cannot wait for that

"""The demo: search a long video for small patches, by exact distributed cross-attention.

Every rank reads its own frames and keeps their patches as keys and values; every rank searches for
patches that others hold. One call answers all ranks' queries, and sends the few queries instead of
the many keys::

    q (1, 1, s_q, 64)     noisy descriptors            out (1, 1, s_q, 3)    where they were found
    k (1, 1, s_kv, 64)    descriptors of my patches    lse (1, 1, s_q)
    v (1, 1, s_kv, 3)     their frame, row, column
"""

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from lvxattn.cli import InputError
from lvxattn.cli.run_ranks import check_room
from lvxattn.common.layout import share
from lvxattn.common.validation import raise_together
from lvxattn.mpi_impl import Layout, Meter, cross_attention
from lvxattn.mpi_impl.commands.demo.answers import (
    Answers,
    Check,
    check_errors,
    check_output,
    check_verdicts,
    choose_examples,
    frames_to_draw,
    judge_answers,
    rounding,
)
from lvxattn.mpi_impl.commands.demo.files import list_images
from lvxattn.mpi_impl.commands.demo.patches import PATCH, D, choose_queries, describe, places
from lvxattn.mpi_impl.commands.demo.search_report import (
    Costs,
    Progress,
    print_problem,
    print_result,
)
from lvxattn.mpi_impl.commands.demo.sources import Source, open_source
from lvxattn.mpi_impl.commands.run import MPIRanks
from lvxattn.reference import full_attention

SCALE = 1000.0
"""Inverse temperature: a correlation lower by 0.01 lowers the weight by a factor of exp(-10)."""

Floats = NDArray[np.float32]
T = TypeVar("T")


def search_video(options: Namespace, comm: MPI.Intracomm) -> bool:
    """Run the demo. Collective: every rank of comm calls this.

    Parameters
    ----------
    options : argparse.Namespace
        ``video`` and ``images`` (str or None), ``frames`` (int or None), ``queries``, ``seed``
        (int) and ``output`` (str).
    comm : mpi4py.MPI.Intracomm

    Returns
    -------
    bool
        Whether all checks passed; the same on all ranks.

    Raises
    ------
    InputError
        There is nothing to search, or it cannot be read; the same on all ranks.
    """
    MPIRanks(comm).limit_threads()
    progress = Progress(comm)
    try:
        return _search(options, comm, progress)
    finally:
        progress.clear()


def _search(options: Namespace, comm: MPI.Intracomm, progress: Progress) -> bool:
    # Limits the time of all waits but those for what a rank reads or draws.
    ranks = MPIRanks(comm)

    # 1. rank 0 opens the source; every rank reads its own frames
    progress.start("opening the source")
    opened = _together(lambda: _open(options) if comm.rank == 0 else None, comm)
    source = cast(Source, ranks.bcast(opened))
    held_here = share(source.frames, comm.rank, comm.size)
    first, last = held_here.start, held_here.stop
    need = _least_nbytes(source, last - first, comm.rank)
    memory = check_room(need, ranks, "give fewer --frames, or use more hosts")
    if comm.rank == 0:
        progress.clear()
        print(f"memory: at least {memory}", flush=True)
    progress.start("reading frames")
    started = time.perf_counter()
    frames = _together(
        lambda: source.read(first, last, lambda done: progress.update(done, last - first)), comm
    )
    k = describe(frames).reshape(1, 1, -1, D)  # (1, 1, s_kv, D)
    v = places(first, last, source.rows, source.cols).reshape(1, 1, -1, 3)  # (1, 1, s_kv, 3)
    reading = time.perf_counter() - started
    progress.finish()

    # 2. every rank searches for patches of other ranks
    rng = np.random.default_rng([options.seed, comm.rank])
    truth, seen = choose_queries(frames, first, options.queries, ranks, rng)
    q = _describe_patches(seen)
    layout = Layout.agree(q, k, v, ranks, scale=SCALE)
    if layout.S_Q == 0:
        raise InputError(
            f"the source: expected patches with some texture to search for; {source.title}: "
            f"{source.frames} frame{'s' * (source.frames > 1)}, all flat (on all ranks)"
        )
    if comm.rank == 0:
        print_problem(source, comm.size, layout.S_Q, layout.S_KV, SCALE)

    # 3. the attention: queries travel, keys and values stay
    progress.start("searching")
    meter = Meter()
    out, lse = cross_attention(q, k, v, comm, scale=SCALE, layout=layout, meter=meter)
    progress.finish()
    weight = _weight(q[0, 0], _describe_patches(truth.pixels)[0, 0], lse[0, 0])
    asker = np.full(len(truth), comm.rank)
    mine = Answers(asker, truth.holder, truth.place, seen, q[0, 0], out[0, 0], lse[0, 0], weight)
    spent = reading, meter.computing, meter.waiting
    cost = Costs(len(frames), len(mine), k.shape[2], meter.messages, meter.bytes, *spent)

    # 4. rank 0 checks and reports what all ranks found
    progress.start("checking against the reference")
    gathered, costs = ranks.gather(mine), ranks.gather(cost)
    keys, values = ranks.gather(k), ranks.gather(v)
    passed, verdicts, examples, wanted = True, [""], [0], [0]
    if gathered and costs and keys and values:
        answers = Answers.join(gathered)
        K, V = np.concatenate(keys, axis=2), np.concatenate(values, axis=2)  # (1, 1, S_KV, ...)
        verdicts, checks = _judge(answers, K, V, source)
        passed = all(check.passed for check in checks)
        progress.finish()
        print_result(answers, verdicts, checks, costs)
        examples = choose_examples(answers, verdicts)
        wanted = frames_to_draw(answers, examples, source.frames)
    _wait_asleep(comm)  # while rank 0 computes

    # 5. the ranks that hold the frames to be drawn send them to rank 0
    progress.start("drawing")
    passed, wanted = ranks.bcast((passed, wanted))
    held = ranks.gather({n: frames[n - first] for n in wanted if first <= n < last})
    error = None
    if held:
        # Here, on rank 0 alone, as matplotlib takes long to import.
        from lvxattn.mpi_impl.commands.demo.draw import draw

        pictures = {n: frame for part in held for n, frame in part.items()}
        starts = [share(source.frames, n, comm.size).start for n in range(comm.size + 1)]
        try:
            draw(Path(options.output), answers, verdicts, examples, pictures, starts, source)
        except OSError as problem:
            error = InputError(f"--output: {options.output} cannot be written: {problem.strerror}")
        else:
            progress.finish()
            outcome = "all checks passed" if passed else "a check FAILED"
            print(f"  wrote {options.output}\n  {outcome}")
    _wait_asleep(comm)
    raise_together(error, comm)
    return passed


def _least_nbytes(source: Source, frames: int, rank: int) -> int:
    """Return how many bytes a rank needs at least: its frames and patches; rank 0 checks all."""
    patches, patch = source.rows * source.cols, PATCH * PATCH * 3
    key = 4 * (D + 3)  # and value, in float32
    whole = source.frames * key if rank == 0 else 0
    return patches * (frames * (patch + key) + 2 * whole)


def _open(options: Namespace) -> Source:
    output = Path(options.output)
    check_output(output)
    source = open_source(options)
    read = [Path(options.video)] if options.video is not None else []
    read += list_images(Path(options.images)) if options.images is not None else []
    if output.exists() and any(output.samefile(path) for path in read):
        raise ValueError(f"--output: expected another file than those searched, got {output}")
    return source


def _together(read: Callable[[], T], comm: MPI.Intracomm) -> T:
    """Read on every rank; raise the error of one on all."""
    result, error = None, None
    try:
        result = read()
    except (ValueError, OSError, MemoryError) as problem:
        error = InputError(str(problem))
    raise_together(error, comm)
    return cast(T, result)


def _describe_patches(pixels: NDArray[np.uint8]) -> Floats:
    """Return the descriptors of single patches: (1, 1, n, D)."""
    return describe(pixels).reshape(1, 1, -1, D)


def _weight(q: Floats, k: Floats, lse: Floats) -> NDArray[np.float64]:
    """Return the weight of key k[n] for query q[n], given lse over all keys."""
    score = SCALE * (q.astype(np.float64) * k).sum(axis=-1)
    weight: NDArray[np.float64] = np.exp(score - lse)
    return weight


def _judge(answers: Answers, K: Floats, V: Floats, source: Source) -> tuple[list[str], list[Check]]:
    """Check all answers against the truth and against the reference."""
    extent = np.array([source.frames - 1, source.rows - 1, source.cols - 1])
    tolerance = rounding(D, SCALE)
    verdicts = judge_answers(answers.out, answers.truth, answers.weight, extent, 2 * tolerance)
    out, lse = full_attention(answers.q[None, None], K, V, scale=SCALE)
    errors = check_errors(
        answers.out, answers.lse, out[0, 0], lse[0, 0], float(extent.max()), tolerance
    )
    return verdicts, errors + check_verdicts(verdicts, distinct=source.distinct)


def _wait_asleep(comm: MPI.Intracomm) -> None:
    """Wait for all ranks without spinning: rank 0 may need the core."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.002)

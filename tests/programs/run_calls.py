"""Call the public functions in all supported ways; rank 0 prints each rank's verdicts by check.

A check is a function of the communicator that returns one verdict or several.
"""

import gc
import json
import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.common.handshake import SCHEDULES
from lvxattn.mpi_impl.recompute import project
from tests.cases import WAYS, Case, Problem, options_of
from tests.judge import solve, worst_ratios
from tests.programs import shared
from tests.watched import Watched

Check = Callable[[MPI.Intracomm], Any]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def right(problem: Problem, comm: Any, **options: Any) -> bool:
    """Solve a problem, forward and backward, and return whether this rank's results are right."""
    return max(worst_ratios(problem, solve(problem, comm, mpi_impl, **options)).values()) <= 1


ROTATIONS = "lv-xattn", "ring"
RAGGED = Case("ragged", B=2, H=4, H_KV=2, D_V=5, mask="full", cut="ragged")


@check
def another_dtype_after_a_backward(comm: MPI.Intracomm) -> Any:
    """Forward, backward, forward again in other dtypes, on equal shapes: nothing is kept."""
    dtypes = ("float64", "float32", "float16", "float64")
    return [right(Case("same name", dtype=d, cut="ragged").make(), comm) for d in dtypes]


@check
def two_forwards_before_their_backwards(comm: MPI.Intracomm) -> Any:
    """The backwards come in the other order: a forward leaves nothing behind for its backward."""
    problems = [Case("first", S_Q=40).make(), Case("second", S_Q=40).make()]
    parts = [problem.part(comm.rank, comm.size) for problem in problems]
    forwards = [
        mpi_impl.cross_attention(p["q"], p["k"], p["v"], comm, scale=problem.scale)
        for problem, p in zip(problems, parts, strict=True)
    ]
    verdicts = []
    for problem, p, (out, lse) in reversed(list(zip(problems, parts, forwards, strict=True))):
        gradients = mpi_impl.cross_attention_backward(
            p["dout"], p["q"], p["k"], p["v"], out, lse, comm, scale=problem.scale, dlse=p["dlse"]
        )
        results = {
            name: mpi_impl.unshard(x, comm)
            for name, x in zip(("dq", "dk", "dv"), gradients, strict=True)
        }
        verdicts.append(max(worst_ratios(problem, results).values()) <= 1)
    return verdicts


@check
def with_a_layout_nothing_is_agreed_on(comm: MPI.Intracomm) -> Any:
    problem = RAGGED.make()
    part = problem.part(comm.rank, comm.size)
    arguments = part["q"], part["k"], part["v"]
    options = {"scale": problem.scale, "mask": part["mask"]}
    layout = mpi_impl.Layout.agree(*arguments, comm, **options)
    watched: Any = Watched(comm)
    out, lse = mpi_impl.cross_attention(*arguments, watched, **options, layout=layout)
    mpi_impl.cross_attention_backward(
        part["dout"], *arguments, out, lse, watched, **options, layout=layout
    )
    messages = 4 * (comm.size - 1)
    sent = {"Isend": messages, "Irecv": messages} if messages else {}
    return dict(watched.calls) == sent | {"Iallreduce": 1}  # the backward's look at lse


@check
def without_a_layout_there_is_one_collective_more_a_call(comm: MPI.Intracomm) -> Any:
    problem = RAGGED.make()
    part = problem.part(comm.rank, comm.size)
    watched: Any = Watched(comm)
    arguments = part["q"], part["k"], part["v"]
    out, lse = mpi_impl.cross_attention(*arguments, watched)
    forward = watched.calls["allgather"]
    mpi_impl.cross_attention_backward(part["dout"], *arguments, out, lse, watched)
    known = {"allgather", "Iallreduce", "Isend", "Irecv", "host"}  # a virtual one has a host
    return [forward == 1, watched.calls["allgather"] == 2, set(watched.calls) <= known]


@check
def only_wanted_gradients_are_computed(comm: MPI.Intracomm) -> Any:
    """The same bits as without; and what one rank wants, all compute."""
    verdicts = []
    for way in WAYS:
        part = RAGGED.on(way, comm.size).make().part(comm.rank, comm.size, way)
        given = [part[x] for x in "qkv"]
        options = {"mask": part["mask"], **options_of(way, comm.size)}
        out, lse = mpi_impl.cross_attention(*given, comm, **options)
        every, *others = (
            mpi_impl.cross_attention_backward(
                part["dout"], *given, out, lse, comm, gradients=wanted, **options
            )
            for wanted in (None, "q", "kv", "q" if comm.rank == 0 else "kv")
        )
        computed = ["q", "kv", "q" if comm.size == 1 else "qkv"]
        for gradients, found in zip(computed, others, strict=True):
            for name, got, want in zip("qkv", found, every, strict=True):
                is_there = got is not None and got.tobytes() == want.tobytes()
                verdicts.append(is_there if name in gradients else got is None)
    return verdicts


@check
def decoding_allocates_nothing_of_a_block_s_or_a_shard_s_size(comm: MPI.Intracomm) -> Any:
    """Text of length 1 on the last rank, or replicated, against resident keys."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 2, 8192, 64), np.float32)
    verdicts = []
    for schedule, queries in shared.DECODES:
        mine = 1 if queries == "replicated" or comm.rank == comm.size - 1 else 0
        q = rng.standard_normal((1, 8, mine, 64), np.float32)
        layout = mpi_impl.Layout.agree(q, k, v, comm, schedule=schedule, queries=queries)
        how: dict[str, Any] = {"layout": layout, "queries": queries}
        first, _ = mpi_impl.cross_attention(q, k, v, comm, **how)
        before = buffers(layout)
        tracemalloc.start()
        for _ in range(50):
            again, _ = mpi_impl.cross_attention(q, k, v, comm, **how)
            verdicts.append(np.allclose(again, first, rtol=0, atol=1e-6))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        verdicts += [buffers(layout) == before, peak < k[:, :1].nbytes / 4]
        if comm.size > 1:  # queries and results, in and out
            verdicts.append(0 < len(before) <= 4)
    return verdicts


def buffers(layout: Any) -> list[int]:
    """Return the addresses of the layout's free buffers."""
    kept = [x.buffer.array for held in layout.pool.at_rest.values() for x in held]
    return sorted(x.ctypes.data for x in kept)


@check
def text_grows_while_keys_stay(comm: MPI.Intracomm) -> Any:
    return shared.text_grows_while_keys_stay(comm, mpi_impl)


@check
def results_outlive_later_calls(comm: MPI.Intracomm) -> Any:
    return shared.results_outlive_later_calls(comm, mpi_impl)


@check
def a_call_leaves_nothing_to_collect(comm: MPI.Intracomm) -> Any:
    """Its buffers are free again at its end, not when Python next looks for cycles."""
    problem = Case("long", S_Q=1000 * comm.size, S_KV=40, D=64).make()
    part = problem.part(comm.rank, comm.size)
    mine = part["q"], part["k"], part["v"]
    verdicts = []
    for schedule in ROTATIONS:
        mpi_impl.cross_attention(*mine, comm, schedule=schedule)
        gc.collect()
        gc.disable()
        tracemalloc.start()
        mpi_impl.cross_attention(*mine, comm, schedule=schedule)
        left, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gc.enable()
        verdicts.append(left < 2**16)
    return verdicts


@check
def any_size_of_block_arrives(comm: MPI.Intracomm) -> Any:
    """From a few bytes, sent eagerly, to 31 MB, which wait for their receiver; and empty ones."""
    verdicts = []
    for rows in (1, 1_000, 60_000):
        case = Case("long", H=1, H_KV=1, S_Q=rows, S_KV=5, D=128, D_V=4, dtype="float32")
        problem = case.make()
        part = problem.part(0, 1)  # the first rank holds all queries
        q, dout, dlse = (part[n][:, :, : None if comm.rank == 0 else 0] for n in QUERIES)
        k, v = mpi_impl.shard(part["k"], comm), mpi_impl.shard(part["v"], comm)
        out, lse = mpi_impl.cross_attention(q, k, v, comm)
        dq, *dkv = mpi_impl.cross_attention_backward(dout, q, k, v, out, lse, comm, dlse=dlse)
        dk, dv = (mpi_impl.unshard(x, comm) for x in dkv)
        results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        verdicts.append(comm.rank > 0 or max(worst_ratios(problem, results).values()) <= 1)
    return verdicts


QUERIES = "q", "dout", "dlse"


@check
def arrays_of_any_stride_work_and_are_left_alone(comm: MPI.Intracomm) -> Any:
    """Transposed, every other element, stride 0 and read-only: as right as plain copies."""
    rng = np.random.default_rng(comm.rank)
    q = rng.standard_normal((2, 5 + comm.rank, 4, 6)).swapaxes(1, 2)
    k = rng.standard_normal((2, 2, 14, 12))[:, :, ::2, ::2]
    v = np.broadcast_to(rng.standard_normal((2, 1, 1, 3)), (2, 2, 7, 3))
    dout = np.asfortranarray(rng.standard_normal((2, 4, 5 + comm.rank, 3)))
    dlse = np.broadcast_to(np.float64(0.5), q.shape[:3])
    S_Q = comm.allreduce(q.shape[2])
    mask = rng.random((7, S_Q)).T < 0.7
    odd = {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse, "mask": mask}
    plain = {name: np.array(x, order="C") for name, x in odd.items()}
    for x in odd.values():
        x.flags.writeable = False
    got = zip(("out", "lse", "dq", "dk", "dv"), results_of(odd, comm), strict=True)
    results = {name: mpi_impl.unshard(x, comm) for name, x in got}
    whole = [mpi_impl.unshard(plain[name], comm) for name in ("q", "k", "v", "dout", "dlse")]
    columns = np.concatenate(comm.allgather(plain["mask"]), axis=-1)
    case = Case("odd", B=2, H=4, H_KV=2, S_Q=S_Q, S_KV=7 * comm.size, D=6, D_V=3)
    problem = Problem(case, *whole, scale=6**-0.5, mask=columns)
    untouched = all(odd[name].tobytes() == plain[name].tobytes() for name in odd)
    return [
        max(worst_ratios(problem, results).values()) <= 1,
        untouched,
        not any(x.flags.c_contiguous for x in odd.values()),
    ]


@check
def inputs_are_unmodified_and_results_are_not_views_of_them(comm: MPI.Intracomm) -> Any:
    verdicts = []
    for dtype in ("float64", "float16"):
        problem = Case("inputs", B=2, H=4, H_KV=2, mask="additive", dtype=dtype).make()
        arrays = {n: x.copy() for n, x in problem.part(comm.rank, comm.size).items()}
        before = {n: x.copy() for n, x in arrays.items()}
        results = results_of(arrays, comm)
        verdicts += [x.tobytes() == before[n].tobytes() for n, x in arrays.items()]
        verdicts += [not np.shares_memory(x, y) for x in results for y in arrays.values()]
    return verdicts


def results_of(a: dict[str, Any], comm: Any) -> tuple[Any, ...]:
    out, lse = mpi_impl.cross_attention(a["q"], a["k"], a["v"], comm, mask=a["mask"])
    gradients = mpi_impl.cross_attention_backward(
        a["dout"], a["q"], a["k"], a["v"], out, lse, comm, dlse=a["dlse"], mask=a["mask"]
    )
    return out, lse, *gradients


@check
def two_rings_at_once_in_split_communicators(comm: MPI.Intracomm) -> Any:
    """Even and odd ranks solve different problems at the same time."""
    part = comm.Split(comm.rank % 2, comm.rank)
    verdict = right(Case(f"ring {comm.rank % 2}", S_Q=20 + comm.rank % 2).make(), part)
    part.Free()
    return verdict


@check
def a_communicator_in_another_order(comm: MPI.Intracomm) -> Any:
    """Ranks are numbered backwards: shares are in this communicator's order, not the world's."""
    backwards = comm.Split(0, -comm.rank)
    assert backwards.rank == comm.size - 1 - comm.rank
    verdict = right(RAGGED.make(), backwards)
    backwards.Free()
    return verdict


@check
def a_duplicate_used_in_turns_with_its_original(comm: MPI.Intracomm) -> Any:
    other = comm.Dup()
    verdicts = [right(RAGGED.make(), c) for c in (comm, other, comm)]
    other.Free()
    return verdicts


@check
def messages_of_the_user_stay_pending(comm: MPI.Intracomm) -> Any:
    """Messages and receives with other tags, on the same communicator, stay pending."""
    left, right_ = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    landed = [np.zeros(3), np.zeros(3)]
    receives = [comm.Irecv(landed[0], left, 7000), comm.Irecv(landed[1], left, 7003)]
    early = comm.Isend(np.full(4, comm.rank, float), right_, 0)  # not received yet
    verdict = right(RAGGED.make(), comm)
    still = not any(request.Test() for request in receives)
    comm.barrier()
    sends = [comm.Isend(np.full(3, tag, float), right_, tag) for tag in (7003, 7000)]
    late = np.zeros(4)
    comm.Recv(late, left, 0)
    MPI.Request.Waitall([*receives, *sends, early])
    landings = ((late, left), (landed[0], 7000), (landed[1], 7003))
    return [verdict, still, *(bool((array == value).all()) for array, value in landings)]


@check
def a_layer_equals_its_parts(comm: MPI.Intracomm) -> Any:
    """The layer that recomputes its keys gives the same bits as its parts."""
    rng = np.random.default_rng(0)
    w_k, w_v, all_q, all_dout = (
        rng.standard_normal(shape) for shape in ((5, 4, 3), (5, 4, 7), (2, 4, 5, 3), (2, 4, 5, 7))
    )
    rng = np.random.default_rng(comm.rank)
    y = rng.standard_normal((2, 9 - comm.rank, 5))
    q, dout = (rng.standard_normal((2, 4, 4 + comm.rank, wide)) for wide in (3, 7))

    def make_kv(y: Any) -> Any:
        return project(y, w_k), project(y, w_v)

    verdicts = []
    for schedule in (*SCHEDULES, "auto", "replicated"):
        options: dict[str, Any] = {"schedule": schedule}
        if schedule == "replicated":
            q, dout, options = all_q, all_dout, {"queries": schedule}
        meters = mpi_impl.Meter(), mpi_impl.Meter()
        options["meter"] = meters[0]
        out, saved = mpi_impl.cross_attention_layer(q, y, make_kv, comm, **options)
        got = mpi_impl.cross_attention_layer_backward(dout, saved, make_kv, comm, **options)

        given = q, *make_kv(y)
        options["meter"] = meters[1]
        want_out, lse = mpi_impl.cross_attention(*given, comm, **options)
        want = mpi_impl.cross_attention_backward(dout, *given, want_out, lse, comm, **options)
        pairs = zip((out, saved.lse, *got), (want_out, lse, *want), strict=True)
        verdicts += [a.tobytes() == b.tobytes() for a, b in pairs]
        sent = [(meter.messages, meter.bytes) for meter in meters]
        verdicts.append(sent[0] == sent[1])

    def shorter(y: Any) -> Any:
        return tuple(x[:, :, comm.rank :] for x in make_kv(y))

    try:  # an error of one rank is raised on all
        mpi_impl.cross_attention_layer_backward(dout, saved, shorter, comm, queries=schedule)
    except ValueError as error:
        text = str(error)
        verdicts.append(text.startswith("make_kv: "))
        verdicts.append(text.endswith(f"(on rank 1 of {comm.size})"))
    else:
        verdicts.append(comm.size == 1)
    return verdicts


@check
def only_rank_0_s_machine_counts(comm: MPI.Intracomm) -> Any:
    """The other ranks may have none, or another one: all choose the same schedule."""
    return shared.machine_of_rank_0_counts(comm, mpi_impl)


@check
def rows_hidden_by_a_finite_number(comm: MPI.Intracomm) -> Any:
    return shared.hidden_rows_are_right(comm, mpi_impl)


@check
def errors_at_a_large_lse_are_hardly_those_of_more_ranks(comm: MPI.Intracomm) -> Any:
    return shared.errors_grow_at_most_twofold(comm, MPI.COMM_SELF, mpi_impl)


@check
def no_thread_is_left(comm: MPI.Intracomm) -> Any:
    return threading.active_count() == 1


report = {}
for name, function in CHECKS.items():
    verdict = function(MPI.COMM_WORLD)
    verdicts = MPI.COMM_WORLD.allgather(np.asarray(verdict, bool).ravel().tolist())
    report[name] = verdicts
if MPI.COMM_WORLD.rank == 0:
    json.dump(report, sys.stdout)

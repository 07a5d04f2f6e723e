"""Checks that run_calls.py and torch_calls.py have in common."""

from functools import partial
from itertools import product
from typing import Any

import numpy as np

from lvxattn.common.handshake import MASKS_TRAVEL, SCHEDULES
from lvxattn.common.layout import shard
from lvxattn.plan import MACHINES
from lvxattn.reference import Causal, full_attention
from tests import hidden
from tests.cases import WAYS, Case, options_of
from tests.judge import solve

# Schedule and queries of the ways to decode.
DECODES = ("lv-xattn", "sharded"), ("gather", "sharded"), ("lv-xattn", "replicated")


def machine_of_rank_0_counts(comm: Any, implementation: Any) -> list[bool]:
    q, k = (shard(np.ones((2, 2, s, 4)), comm) for s in (40, 2))
    machines = [MACHINES["h100"], None, MACHINES["a30-8"]]
    machine = machines[comm.rank % 3]
    agree = partial(implementation.Layout.agree, q, k, k, comm, schedule="auto")
    layout, by_bytes = agree(machine=machine), agree(machine=machine if comm.rank else None)
    chosen = comm.allgather([layout.schedule, by_bytes.schedule])
    # Here latency takes the time; one rank sends nothing.
    wanted = ["gather", "ring"] if comm.size > 1 else chosen[0]
    return [chosen == [wanted] * comm.size, layout.machine == machines[0], not by_bytes.machine]


def hidden_rows_are_right(comm: Any, implementation: Any) -> list[bool]:
    return [
        right
        for schedule in WAYS
        for right in hidden.all_right(
            partial(solve, comm=comm, implementation=implementation, schedule=schedule),
            schedule,
            comm.size,
        )
    ]


def errors_grow_at_most_twofold(comm: Any, alone: Any, implementation: Any) -> list[bool]:
    """Compare with one rank, in the mean over the elements of a result, where |lse| is large."""
    verdicts = []
    for level in (-1e4, -900.0, 900.0, 1e4):
        problem = Case("large lse", H=4, S_Q=65, S_KV=601, dtype="float32", shift=level).make()
        together, single = (solve(problem, c, implementation) for c in (comm, alone))
        truth = problem.truth().results
        for name in together:
            many, one = (np.square(x[name] - truth[name]).mean() for x in (together, single))
            verdicts.append(many <= 2**2 * one)
    return verdicts


def results_outlive_later_calls(comm: Any, implementation: Any) -> list[bool]:
    """One row or one head, as it lies in a message: a result must not be a view of a buffer."""
    verdicts = []
    for way in WAYS:
        heads = comm.size if way == "ulysses" else 1
        rows = 1 if way == "replicated" or comm.rank == comm.size - 1 else 0
        shapes = (1, heads, rows, 4), (1, heads, 3, 4), (1, heads, 3, 4)
        rng = np.random.default_rng(comm.rank if way in SCHEDULES else 0)
        options: dict[str, Any] = dict(options_of(way, comm.size))
        given = [rng.standard_normal(shape) for shape in shapes]
        options["layout"] = implementation.Layout.agree(*given, comm, **options)
        found, copies = [], []
        for _ in range(2):
            out, lse = implementation.cross_attention(*given, comm, **options)
            results = out, lse, *implementation.cross_attention_backward(
                np.ones_like(out), *given, out, lse, comm, **options
            )  # fmt: skip
            found.append(results)
            copies.append([x.copy() for x in results])
            given = [rng.standard_normal(shape) for shape in shapes]
        for results, copied in zip(found, copies, strict=True):
            verdicts += [np.array_equal(a, b) for a, b in zip(results, copied, strict=True)]
    return verdicts


def text_grows_while_keys_stay(comm: Any, implementation: Any) -> list[bool]:
    """A prompt, then one token more at every step: results, by every way and kind of mask."""
    verdicts = []
    for way, kind in product((*SCHEDULES, "replicated"), GROWING_MASKS):
        P, whole = comm.size, way == "replicated"
        S_Q, S_KV = 3 * P, 5 * P + 2
        rng = np.random.default_rng(P)
        shapes = (S_Q + 4, 4), (S_KV, 4), (S_KV, 4)
        q, k, v = (rng.standard_normal((1, P, *shape)) for shape in shapes)
        rows = rng.random((S_Q + 4, S_KV)) < 0.7
        ends = [0, *(5 * n + 2 for n in range(1, P + 1))]  # the first rank has two keys more
        mine = slice(ends[comm.rank], ends[comm.rank + 1])
        layout = None
        for length in (S_Q, *range(S_Q + 1, S_Q + 5), 1):
            s_q = [1] * (P - 1) + [length - P + 1] if length >= P else [0] * (P - 1) + [length]
            mask: Any = {
                "none": None, "callable": shows, "rule": Causal(S_KV - length),
                "one row": rows[:1], "rows": rows[:length],
            }[kind]  # fmt: skip
            own = mask if mask is None or callable(mask) else mask[:, mine]
            start = 0 if whole else sum(s_q[: comm.rank])
            part = slice(0, length) if whole else slice(start, start + s_q[comm.rank])
            given = q[:, :, part], k[:, :, mine], v[:, :, mine]
            options = {"mask": own, "queries": "replicated" if whole else "sharded"}
            how = {} if whole else {"schedule": way}
            if layout is None:
                layout = implementation.Layout.agree(*given, comm, **options, **how)
            elif kind == "rows" and way in MASKS_TRAVEL:
                try:
                    layout.with_queries(s_q, comm)
                except ValueError as error:
                    verdicts.append("array masks of one row" in str(error))
                continue
            else:
                rule = mask if kind == "rule" else None
                layout = layout.with_queries(length if whole else s_q, comm, rule=rule)
            out, lse = implementation.cross_attention(*given, comm, layout=layout, **options)
            truth = full_attention(q[:, :, :length], k, v, mask=mask)
            pairs = zip((out, lse), truth, strict=True)
            verdicts += [np.allclose(a, b[:, :, part], rtol=0, atol=1e-12) for a, b in pairs]
    return verdicts


GROWING_MASKS = "none", "callable", "rule", "one row", "rows"


def shows(_b: Any, _h: Any, q_index: Any, kv_index: Any) -> Any:
    """Return a mask that is a callable."""
    return (q_index + 2 * kv_index) % 5 > 0

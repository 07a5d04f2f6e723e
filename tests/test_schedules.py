"""The reference, on virtual ranks, against the naive softmax."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.common.handshake import SCHEDULES
from tests.cases import CASES, WAYS, Case, options_of
from tests.judge import solve, worst_ratios

# Every case with every schedule on one number of ranks, by turns; on all others if asked.
NUMBERS = (1, 2, 3, 4, 5, 7)
RUNS = [
    pytest.param(
        schedule, case, P, id=f"{case.name}-{P}-{schedule}",
        marks=[] if NUMBERS[(n + m) % len(NUMBERS)] == P else pytest.mark.slow,
    )
    for m, schedule in enumerate(WAYS)
    for n, case in enumerate(CASES)
    for P in NUMBERS
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "case", "P"), RUNS)
def test_equals_naive_softmax_and_its_gradients(schedule: str, case: Case, P: int) -> None:
    problem = case.on(schedule, P).make()
    truth = problem.truth()
    for results in reference.run_ranks(
        P, lambda comm: solve(problem, comm, reference, schedule=schedule)
    ):
        assert max(worst_ratios(problem, results, truth, fp64=True).values()) <= 1


@pytest.mark.parametrize("P", [1, 2, 3, 5])
@pytest.mark.parametrize("mask", ["none", "full", "over queries"])
def test_ring_traffic(mask: str, P: int) -> None:
    case = Case("ring traffic", B=2, H=6, H_KV=2, D_V=5, cut="ragged", mask=mask)
    problem = case.make()

    def fn(comm: reference.VirtualComm) -> tuple[reference.Meter, reference.Meter]:
        part, meters = problem.part(comm.rank, P), (reference.Meter(), reference.Meter())
        q, k, v = (part[name] for name in "qkv")
        options = {"schedule": "ring", "mask": part["mask"]}
        out, lse = reference.cross_attention(q, k, v, comm, **options, meter=meters[0])
        reference.cross_attention_backward(
            part["dout"], q, k, v, out, lse, comm, **options, meter=meters[1]
        )
        return meters

    bounds = case.cuts(P)[1]
    s_kv = [stop - start for start, stop in pairwise(bounds)]
    heads_of_mask = {"none": 0, "full": case.B * case.H * case.S_Q, "over queries": case.B * case.H}
    for rank, (forward, backward) in enumerate(reference.run_ranks(P, fn)):
        # A rank sends on every block but that of its right neighbour, for which it is the last.
        passed_on = sum(s_kv) - s_kv[(rank + 1) % P]
        blocks = passed_on * (case.B * case.H_KV * (case.D + case.D_V) * 8 + heads_of_mask[mask])
        # Gradients follow all blocks but its own.
        gradients = (sum(s_kv) - s_kv[rank]) * case.B * case.H_KV * (case.D + case.D_V) * 8
        assert (forward.messages, forward.bytes) == (P - 1, blocks if P > 1 else 0)
        assert backward.messages == 2 * (P - 1)
        assert backward.bytes == (blocks + gradients if P > 1 else 0)


def test_ulysses_requires_kv_heads_divisible_by_ranks() -> None:
    problem = Case("too few heads", H=4, H_KV=2).make()
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        reference.run_ranks(4, lambda comm: solve(problem, comm, reference, schedule="ulysses"))
    assert str(raised.value) == (
        "schedule: expected H_KV divisible by the 4 ranks with 'ulysses', got H_KV = 2 "
        "(on rank 0 of 4)"
    )


@pytest.mark.parametrize("kinds", ["FTN", "TTA", "NNA", "AAA", "NTN"])
def test_ulysses_joins_masks_of_every_kind(kinds: str) -> None:
    """F is one of all heads, T of one, A additive, N none."""
    P = len(kinds)
    case = Case("mixed masks", B=2, H=6, H_KV=3, S_Q=11, S_KV=21)
    problem = case.make()
    rng = np.random.default_rng(1)
    full = rng.random((2, 6, 11, 21)) < 0.7
    full[:, :, :, 0] = True
    bias = np.where(full, 0.5, -np.inf)
    whole = np.zeros((2, 6, 11, 21))
    bounds = case.cuts(P)[1]
    masks: list[Any] = []
    for rank, kind in enumerate(kinds):
        keys = slice(*bounds[rank : rank + 2])
        mask = {"F": full, "T": full[:, :1], "A": bias, "N": None}[kind]
        masks.append(None if mask is None else mask[..., keys])
        if kind in "FT":
            whole[..., keys] = np.where(masks[-1], 0.0, -np.inf)
        if kind == "A":
            whole[..., keys] = masks[-1]
    want = replace(problem, mask=whole)

    def fn(comm: reference.VirtualComm) -> Any:
        part = problem.part(comm.rank, P)
        options = {"mask": masks[comm.rank], "scale": problem.scale, "schedule": "ulysses"}
        given = part["q"], part["k"], part["v"]
        out, lse = reference.cross_attention(*given, comm, **options)
        found = reference.cross_attention_backward(
            part["dout"], *given, out, lse, comm, dlse=part["dlse"], **options
        )
        parts = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *found), strict=True))
        return {name: reference.unshard(x, comm) for name, x in parts.items()}

    for results in reference.run_ranks(P, fn):
        assert max(worst_ratios(want, results, fp64=True).values()) <= 1


def test_ulysses_calls_callable_mask_for_own_heads() -> None:
    problem = Case("rule of heads", H=3, H_KV=3, mask="callable").make()  # one head a rank
    for results in reference.run_ranks(
        3, lambda comm: solve(problem, comm, reference, schedule="ulysses")
    ):
        assert max(worst_ratios(problem, results, fp64=True).values()) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_replicated_queries_take_no_schedule(schedule: str) -> None:
    """No queries or keys travel, so that heads need not be divided, and masks do not travel."""
    problem = Case("replicated", H=3, H_KV=1).make()

    def fn(comm: reference.VirtualComm) -> list[Any]:
        part, outs = problem.part(comm.rank, 3), []
        options: dict[str, Any] = {"schedule": schedule, "queries": "replicated"}
        if comm.rank:
            options["mask"] = lambda b, h, i, j: i + j + b + h >= 0
        given = problem.q, part["k"], part["v"], comm
        layout = reference.Layout.agree(*given, **options)
        for more in ({}, {"layout": layout, "mask": None}):
            outs.append(reference.cross_attention(*given, **options | more)[0])
        return outs

    want, _ = reference.full_attention(problem.q, problem.k, problem.v)
    for outs in reference.run_ranks(3, fn):
        for out in outs:
            np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_only_wanted_gradients_are_computed(way: str, P: int) -> None:
    """The same bits as without; and what one rank wants, all compute."""
    problem = Case("wanted", B=2, H=4, H_KV=2, cut="ragged", mask="full").on(way, P).make()

    def fn(comm: reference.VirtualComm) -> list[Any]:
        part = problem.part(comm.rank, P, way)
        given, options = [part[x] for x in "qkv"], {"mask": part["mask"], **options_of(way, P)}
        out, lse = reference.cross_attention(*given, comm, **options)
        one = "q" if comm.rank == 0 else "kv"
        layout = reference.Layout.agree(*given, comm, gradients="kv", **options)
        return [
            reference.cross_attention_backward(
                part["dout"], *given, out, lse, comm, **options, **more
            )
            for more in ({}, {"gradients": "q"}, {"gradients": one}, {"layout": layout})
        ]

    for every, only_q, different, only_kv in reference.run_ranks(P, fn):
        assert only_q[1:] == (None, None)
        assert only_kv[0] is None
        assert only_q[0].tobytes() == every[0].tobytes()
        for found, first in ((only_kv, 1), (different, 0 if P > 1 else 3)):
            pairs = zip(found[first:], every[first:], strict=True)
            assert all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("P", [1, 2, 5])
def test_keys_of_both_kinds_under_one_softmax(P: int) -> None:
    """Merged results, and each kind's backward with the merged out and lse."""
    problem = Case("both kinds", B=2, H=4, H_KV=2, S_Q=9, S_KV=30, cut="ragged").make()
    own, rest = slice(0, 9), slice(9, 30)  # a text's keys, on every rank, and sharded ones
    causal = reference.Causal()
    hidden = np.ones((9, 30), bool)
    hidden[:, own] = np.tri(9, dtype=bool)
    truth = replace(problem, mask=hidden)

    def fn(comm: reference.VirtualComm) -> Any:
        part = problem.part(comm.rank, P)
        kinds: list[tuple[Any, Any, dict[str, Any]]] = [
            (problem.k[:, :, own], problem.v[:, :, own], {"mask": causal, "keys": "replicated"}),
            (
                reference.shard(problem.k[:, :, rest], comm),
                reference.shard(problem.v[:, :, rest], comm), {},
            ),
        ]  # fmt: skip
        scale = problem.scale
        found = [
            reference.cross_attention(part["q"], k, v, comm, scale=scale, **options)
            for k, v, options in kinds
        ]
        out, lse = reference.merge(*found[0], *found[1])
        (dq_own, dk_own, dv_own), (dq_rest, *rest_grads) = (
            reference.cross_attention_backward(
                part["dout"], part["q"], k, v, out, lse, comm, dlse=part["dlse"], scale=scale,
                **options,
            )
            for k, v, options in kinds
        )  # fmt: skip
        whole = [reference.unshard(x, comm) for x in (out, lse, dq_own + dq_rest, *rest_grads)]
        dk, dv = (
            np.concatenate([a, b], axis=2) for a, b in zip((dk_own, dv_own), whole[3:], strict=True)
        )
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (*whole[:3], dk, dv), strict=True))

    for results in reference.run_ranks(P, fn):
        assert max(worst_ratios(truth, results, fp64=True).values()) <= 1


def test_no_gradients_at_all_are_refused() -> None:
    problem = Case("none wanted").make()

    def fn(comm: reference.VirtualComm) -> None:
        part = problem.part(comm.rank, 2)
        given = part["q"], part["k"], part["v"]
        results = reference.cross_attention(*given, comm)
        reference.cross_attention_backward(part["dout"], *given, *results, comm, gradients="")

    with pytest.raises(ValueError, match=r"^gradients: expected one of .*, got '' \(on rank 0"):
        reference.run_ranks(2, fn)

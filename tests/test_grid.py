"""The grid: exact for every (a, b), its ends are lv-xattn and ring to the byte, and its volume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.common import layout as layout_module
from lvxattn.plan import MACHINES, messages, planned
from lvxattn.plan.choose import candidates, unlike_ranks, with_grid
from tests.cases import CASES, MASKS, Case, Problem, random_case
from tests.judge import worst_ratios
from tests.naive import Array

ROOT = Path(__file__).parents[1]


def grids(P: int) -> list[tuple[int, int]]:
    return [(a, P // a) for a in range(1, P + 1) if P % a == 0]


SHAPES = [shape for P in (1, 2, 3, 4, 6) for shape in grids(P)]


def solved(problem: Problem, comm: reference.VirtualComm, **options: Any) -> dict[str, Array]:
    """Return whole results of a grid."""
    part = problem.part(comm.rank, comm.size)
    given = part["q"], part["k"], part["v"]
    how = {"scale": problem.scale, "mask": part["mask"]}
    out, lse = reference.cross_attention(*given, comm, schedule="grid", **how, **options)
    gradients = reference.cross_attention_backward(
        part["dout"], *given, out, lse, comm, schedule="grid", dlse=part["dlse"], **how, **options
    )
    found = zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True)
    return {name: reference.unshard(x, comm) for name, x in found}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_naive_softmax_and_its_gradients(shape: tuple[int, int]) -> None:
    P = shape[0] * shape[1]
    for case in CASES[SHAPES.index(shape) % 5 :: 5]:
        problem = case.make()
        truth = problem.truth()
        for results in reference.run_ranks(P, lambda comm, x=problem: solved(x, comm, grid=shape)):
            assert max(worst_ratios(problem, results, truth, fp64=True).values()) <= 1, case.name


def traffic(problem: Problem, comm: reference.VirtualComm, **options: Any) -> Any:
    """Return the layout, and messages and bytes of both passes."""
    part, meters = problem.part(comm.rank, comm.size), (reference.Meter(), reference.Meter())
    given = part["q"], part["k"], part["v"], comm
    layout = reference.Layout.agree(*given, mask=part["mask"], **options)
    how: dict[str, Any] = {"layout": layout, "mask": part["mask"]}
    out, lse = reference.cross_attention(*given, meter=meters[0], **how)
    reference.cross_attention_backward(
        part["dout"], *given[:3], out, lse, comm, meter=meters[1], **how
    )
    return layout, [(meter.messages, meter.bytes) for meter in meters]


@pytest.mark.parametrize("seed", range(len(MASKS)))
def test_sends_what_is_planned_and_at_its_ends_what_the_others_send(seed: int) -> None:
    P = (2, 3, 4, 6)[seed % 4]
    case = random_case(seed)
    case = replace(case, dtype="float64", S_Q=case.S_Q % 40, S_KV=case.S_KV % 60, B=1)
    problem = case.make()
    hosts = [f"host {rank % 2}" for rank in range(P)]  # the ring is not in rank order
    sent = {}
    for options in (
        *({"schedule": "grid", "grid": shape} for shape in grids(P)),
        {"schedule": "lv-xattn"}, {"schedule": "ring"},
    ):  # fmt: skip
        found = reference.run_ranks(
            P, lambda comm, o=options: traffic(problem, comm, **o), hosts=hosts
        )
        for rank, (layout, counted) in enumerate(found):
            plans = [messages(layout, rank, backward=b) for b in (False, True)]
            assert counted == [(len(plan), sum(m.nbytes for m in plan)) for plan in plans]
        sent[options.get("grid", options["schedule"])] = [counted for _, counted in found]
    assert sent[P, 1] == sent["lv-xattn"]
    assert sent[1, P] == sent["ring"]


def megabytes(layout: Any, *passes: bool) -> float:
    """Return what the busiest rank sends in some passes, in MB."""
    sent = [
        sum(m.nbytes for b in passes for m in messages(layout, rank, backward=b))
        for rank in unlike_ranks(layout)
    ]
    return max(sent) / 1e6


# Problems, and MB of a forward in bf16, by a; a = P is lv-xattn, a = 1 ring.
VOLUMES = [
    ((16, 8192, 16384, 32, 32), {4: 88, 16: 190, 1: 252}),
    ((64, 8192, 65536, 32, 8), {8: 51, 64: 199, 1: 264}),
    ((256, 8192, 65536, 32, 8), {16: 28, 256: 203, 1: 267}),
    ((16, 2048, 1048576, 32, 8), {16: 48, 1: 4027}),
]


@pytest.mark.parametrize(("problem", "expected"), VOLUMES, ids=[str(v[0]) for v in VOLUMES])
def test_volume_and_its_table(problem: tuple[int, ...], expected: dict[int, int]) -> None:
    P, S_Q, S_KV, H, H_KV = problem
    layout = planned((1, H, S_Q, 128), (1, H_KV, S_KV, 128), P)
    of = {shape[0]: replace(layout, schedule="grid", grid=shape) for shape in grids(P)}
    for a, wanted in expected.items():
        assert megabytes(of[a], False) == pytest.approx(wanted, rel=0.015)
    sent = {c.schedule: c.nbytes for c in candidates(layout)}
    assert sent["grid"] <= min(sent["lv-xattn"], sent["ring"])
    cells = [f"{n:,}" for n in (P, S_Q, S_KV)] + [f"{H}/{H_KV}"]
    for passes in ((False,), (False, True)):
        found = {a: megabytes(x, *passes) for a, x in of.items()}
        a = min(found, key=lambda a: found[a])
        cells += [*(f"{found[end]:,.0f}" for end in (P, 1)), f"{found[a]:,.0f}, {a}x{P // a}"]
    assert f"| {' | '.join(cells)} |\n" in (ROOT / "docs/arguments.md").read_text()
    assert with_grid(replace(layout, schedule="grid")).grid == (a, P // a)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (6, 1), (1, 6)], ids=str)
def test_unlike_ranks_include_the_busiest(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0])
    even = planned((1, 1, 60, 2), (1, 1, 60, 2), 6, schedule="grid", grid=shape)
    for _ in range(20):
        s_q, s_kv = (tuple(int(n) for n in rng.choice([1, 1, 1, 9], 6)) for _ in range(2))
        of = replace(even, order=tuple(rng.permutation(6).tolist()), s_q=s_q, s_kv=s_kv)
        sent = [sum(m.nbytes for m in messages(of, rank)) for rank in range(6)]
        assert megabytes(of, False) == max(sent) / 1e6


@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize("shape", grids(4), ids=str)
def test_replicated_sides_take_no_grid(shape: tuple[int, int], side: str) -> None:
    """As they take no schedule."""
    case = Case("one side whole", S_Q=9, S_KV=14)
    problem, way = case.make(), "replicated" if side == "queries" else "replicated keys"
    found = []
    for more in ({}, {"schedule": "grid", "grid": shape}):
        options: dict[str, Any] = {side: "replicated", "mask": None, **more}

        def fn(comm: reference.VirtualComm, options: dict[str, Any] = options) -> list[Array]:
            part = problem.part(comm.rank, 4, way)
            given = part["q"], part["k"], part["v"]
            out, lse = reference.cross_attention(*given, comm, **options)
            gradients = reference.cross_attention_backward(
                part["dout"], *given, out, lse, comm, **options
            )
            return [out, lse, *gradients]

        found.append(reference.run_ranks(4, fn))
    for ours, theirs in zip(*found, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_ranks_that_disagree_raise_alike() -> None:
    problem = Case("disagree").make()

    def fn(comm: reference.VirtualComm) -> str:
        shape = (2, 2) if comm.rank != 2 else (4, 1)
        with pytest.raises(ValueError, match=r"^grid: ") as caught:
            traffic(problem, comm, schedule="grid", grid=shape)
        return str(caught.value)

    (said,) = set(reference.run_ranks(4, fn))
    assert said == "grid: expected rank 0's (2, 2), got (4, 1) (on rank 2 of 4)"


class Unprintable:
    """A user's object that raises whatever is done with it."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_unprintable_grid_of_one_rank_is_refused_by_all() -> None:
    problem = Case("unprintable").make()

    def fn(comm: reference.VirtualComm) -> str:
        shape: Any = (2, 2) if comm.rank != 2 else Unprintable()
        with pytest.raises(ValueError, match=r"^grid: ") as caught:
            traffic(problem, comm, schedule="grid", grid=shape)
        return str(caught.value)

    (said,) = set(reference.run_ranks(4, fn))
    assert "product is P = 4, got Unprintable (on rank 2 of 4)" in said


def test_numpy_s_numbers_are_numbers() -> None:
    problem, shape = Case("numpy").make(), (np.int64(2), np.int64(2))
    layouts = reference.run_ranks(
        4, lambda comm: traffic(problem, comm, schedule="grid", grid=shape)[0]
    )
    assert {layout.grid for layout in layouts} == {(2, 2)}


@pytest.mark.parametrize(
    ("shape", "S_Q", "S_KV"),
    [((16, 2), 4096, 57344), ((16, 2), 4096, 40960), ((8, 4), 4096, 8192), ((2, 16), 57344, 4096),
     ((4, 8), 8192, 8192), ((32, 1), 4096, 8192)],
)  # fmt: skip
def test_fewer_bytes_cross_hosts_than_the_other_way_round(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], S_Q: int, S_KV: int
) -> None:
    """Also where the ring that sends more does not fit into a host."""
    machine = replace(MACHINES["h100"], ranks_per_host=8, ranks=32)
    sizes = (1, 32, S_Q, 128), (1, 32, S_KV, 128)

    def crossing() -> int:
        of = planned(*sizes, 32, schedule="grid", grid=shape, machine=machine)
        sent = [(rank, m) for rank in range(32) for b in (False, True)
                for m in messages(of, rank, backward=b)]  # fmt: skip
        return sum(m.nbytes for rank, m in sent if of.hosts[rank] != of.hosts[m.dest])

    chosen, (side, _) = crossing(), planned(
        *sizes, 32, schedule="grid", grid=shape, machine=machine
    ).inside  # fmt: skip
    other = ("keys", shape[1]) if side == "queries" else ("queries", shape[0])
    monkeypatch.setattr(layout_module, "side_inside", lambda _: other)
    assert chosen <= crossing()


def test_heavier_side_goes_round_inside_hosts() -> None:
    hosts = ["a", "b"] * 4  # of rank 0, 1, ...
    crossing = {}
    for S_Q, S_KV in ((80, 8), (8, 80)):
        q, k = np.ones((1, 1, S_Q, 2)), np.ones((1, 1, S_KV, 2))
        (layout, *_) = reference.run_ranks(
            8, lambda comm, x=(q, k, k): reference.Layout.agree(
                *(reference.shard(y, comm) for y in x), comm, schedule="grid", grid=(4, 2)
            ), hosts=hosts,
        )  # fmt: skip
        for side in ("queries", "keys"):
            rings = [layout.ring(side, rank) for rank in range(8)]
            crossing[S_Q, side] = any(len({hosts[r] for r in ring}) > 1 for ring in rings)
        columns = {frozenset(layout.ring("queries", rank)) for rank in range(8)}
        rows = {frozenset(layout.ring("keys", rank)) for rank in range(8)}
        assert (len(columns), len(rows)) == (2, 4)
        assert all(len(column & row) == 1 for column in columns for row in rows)
    assert crossing == {
        (80, "queries"): False, (80, "keys"): True, (8, "queries"): True, (8, "keys"): False,
    }  # fmt: skip


def test_prime_number_of_ranks_takes_an_end() -> None:
    problem = Case("prime", S_Q=20, S_KV=21).make()
    for layout, _ in reference.run_ranks(5, lambda comm: traffic(problem, comm, schedule="grid")):
        assert layout.grid in ((5, 1), (1, 5))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"grid": (2, 3)},
            r"^grid: expected two numbers whose product is P = 4, got \(2, 3\) \(on",
        ),
        ({"grid": 4}, "^grid: expected two numbers whose product is P = 4, got 4 "),
        ({"grid": {2: 0, 3: 0}}, r"^grid: expected two .* got \{2: 0, 3: 0\} \(on rank 0 of 4\)"),
        ({"grid": {4, 1}}, r"^grid: expected two .* got \{[14], [14]\} \(on rank 0 of 4\)"),
        ({"grid": b"\2\2"}, "^grid: expected two .* got b"),
        ({"grid": "2" * 1000}, "^grid: expected two .* got '2{79} "),
        (
            {"grid": np.ones((2, 2))},
            r"^grid: expected two .* got array\(\[\[1., 1.\], \[1., 1.\]\]\) ",
        ),
        ({"grid": (2, 2), "schedule": "ring"}, "^grid: expected none with schedule 'ring', got"),
    ],
)
def test_impossible_grids_are_refused(options: Any, text: str) -> None:
    problem = Case("refused").make()
    with pytest.raises(ValueError, match=text):
        reference.run_ranks(
            4, lambda comm: traffic(problem, comm, **{"schedule": "grid"} | options)
        )

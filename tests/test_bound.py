"""The lower bound: against all choices of small problems, and against what every schedule sends."""

import re
from dataclasses import replace
from math import ceil

import numpy as np
import pytest

from benchmarks.lower_bound import presets, sweep, teams
from lvxattn.common.handshake import SCHEDULES
from lvxattn.common.layout import Layout
from lvxattn.common.wire import ITEMSIZE
from lvxattn.plan import candidates, lower_bound, messages, planned
from lvxattn.plan.choose import refusal
from tests.launch import ROOT

PASSES = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
FREE = 1e9  # more than any problem here costs


def costs(of: Layout, backward: bool) -> tuple[int, int]:
    """Return the bytes of another rank's row, and of another rank's key, as they are sent."""
    narrow, wide = ITEMSIZE[of.dtype], ITEMSIZE[of.accumulator]
    q, k, v, out, lse = of.D, of.D, of.D_V, of.D_V, 1
    if backward:
        dout, delta = out, lse
        return (q + dout) * narrow + (lse + delta + q) * wide, (k + v) * narrow + (k + v) * wide
    return q * narrow + (out + lse) * wide, (k + v) * narrow


def least_of_all_choices(of: Layout, backward: bool) -> float:
    """Return the least cost of any whole numbers of rows and keys of every group."""
    row, key = costs(of, backward)
    G = of.H // of.H_KV
    own_rows, own_keys = G * max(of.s_q), max(of.s_kv)
    rows = np.arange(own_rows, G * of.S_Q + 1)[:, None]
    keys = np.arange(own_keys, of.S_KV + 1)
    pairs, cost = rows * keys, row * (rows - own_rows) + key * (keys - own_keys)
    most = int(pairs.max())
    one = np.full(most + 1, FREE)  # the least cost of exactly so many pairs of a group
    np.minimum.at(one, pairs.ravel(), cost.ravel())
    found = np.minimum.accumulate(one[::-1])[::-1]  # of at least so many
    all_groups = found
    for _ in range(of.B * of.H_KV - 1):
        longer = np.full(len(all_groups) + most, FREE)
        for n, cost_of_n in enumerate(found):
            part = longer[n : n + len(all_groups)]
            np.minimum(part, all_groups + cost_of_n, out=part)
        all_groups = longer
    return float(all_groups[ceil(of.B * of.H * of.S_Q * of.S_KV / of.size)])


def small_problem(rng: np.random.Generator) -> Layout:
    P, B, H_KV = (int(n) for n in rng.integers((2, 1, 1), (6, 3, 4)))
    S_Q, S_KV, G = (int(n) for n in rng.integers((1, 1, 1), (18, 18, 3)))
    D, D_V = (int(2**n) for n in rng.integers(0, 8, 2))
    dtype = str(rng.choice(["float16", "float32", "float64"]))
    return planned((B, G * H_KV, S_Q, D), (B, H_KV, S_KV, D), P, D_V=D_V, dtype=dtype)


@PASSES
@pytest.mark.parametrize("seed", range(60))
def test_bound_is_the_least_of_all_choices(seed: int, backward: bool) -> None:
    """But for fractions of a row or a key, which the bound allows in one group."""
    of = small_problem(np.random.default_rng(seed))
    bound, least = lower_bound(of, backward=backward), least_of_all_choices(of, backward)
    assert bound <= least * (1 + 1e-12)
    assert least <= bound + sum(costs(of, backward))


def sent(of: Layout, backward: bool) -> int:
    return max(
        sum(message.nbytes for message in messages(of, rank, backward=backward))
        for rank in range(of.size)
    )


@PASSES
@pytest.mark.parametrize(
    ("P", "B", "H", "H_KV", "S_Q", "S_KV"),
    [
        *((P, 1, 4, 4, S_Q, S_KV) for P in (2, 4) for S_Q, S_KV in ((64, 64), (3, 999), (999, 3))),
        *((6, B, 6, H_KV, 97, 61) for B in (1, 2) for H_KV in (1, 2, 6)),
        *((8, 1, 8, H_KV, 128, 4096) for H_KV in (1, 8)),
        *((P, 1, 1, 1, S_Q, S_KV) for P in (3, 4, 7) for S_Q, S_KV in ((1, 1), (5, 8), (0, 9))),
        (12, 1, 12, 3, 500, 700),
        (16, 2, 16, 16, 64, 64),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_no_schedule_sends_less(
    dtype: str, P: int, B: int, H: int, H_KV: int, S_Q: int, S_KV: int, backward: bool
) -> None:
    of = planned((B, H, S_Q, 16), (B, H_KV, S_KV, 16), P, D_V=8, dtype=dtype)
    bound = lower_bound(of, backward=backward)
    for schedule in SCHEDULES:
        grids = [(a, P // a) for a in range(1, P + 1) if P % a == 0 and schedule == "grid"]
        for grid in grids or [None]:
            made = replace(of, schedule=schedule, grid=grid)
            if not refusal(made):
                assert sent(made, backward) >= bound * (1 - 1e-12), (schedule, grid)


@PASSES
@pytest.mark.parametrize(
    ("schedule", "P", "H", "H_KV", "S_Q", "S_KV", "over"),
    [
        # All rows of a group cost less than a rank's own keys; all keys less than its own rows.
        ("lv-xattn", 8, 8, 4, 16, 4096, 1),
        ("gather", 8, 8, 4, 16, 4096, 1),
        ("lv-xattn", 4, 1, 1, 8, 400, 1),
        ("ring", 8, 8, 4, 4096, 16, 1),
        ("ring", 4, 1, 1, 400, 8, 1),
        # Whole heads, n of them where the bound has n P / (P + 1), since it has a share of each.
        ("ulysses", 2, 6, 6, 64, 64, 3 / 2),
        ("ulysses", 4, 40, 20, 64, 64, 5 / 4),
        ("ulysses", 8, 72, 72, 64, 64, 9 / 8),
    ],
)
def test_ends_reach_the_bound(
    schedule: str, P: int, H: int, H_KV: int, S_Q: int, S_KV: int, over: float, backward: bool
) -> None:
    of = planned((1, H, S_Q, 32), (1, H_KV, S_KV, 32), P, dtype="float16", schedule=schedule)
    bound = over * lower_bound(of, backward=backward)
    # Of a partial result the schedules send one float32 more; ring sends none.
    rows = {"ring": 0, "ulysses": H // P * S_Q * (P - 1) // P}.get(schedule, H * S_Q * (P - 1) // P)
    assert sent(of, backward) == pytest.approx(bound + 4 * rows * (not backward), rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [(4, 4), (2, 8), (8, 2)])
@pytest.mark.parametrize("G", [1, 2])
def test_grid_reaches_the_bound_of_one_group(a: int, b: int, G: int) -> None:
    # A row costs 8 numbers of float64, a key 7: as much for a x 7 b rows as for b x 8 a keys.
    s_q, s_kv, P = 7 * b, 8 * a * G, a * b
    of = planned((1, G, P * s_q, 3), (1, 1, P * s_kv, 3), P, D_V=4, dtype="float64")
    of = replace(of, schedule="grid", grid=(a, b))
    bound = lower_bound(of)
    assert bound == pytest.approx(8 * (8 * (a - 1) * G * s_q + 7 * (b - 1) * s_kv), rel=1e-12)
    assert sent(of, False) == pytest.approx(bound + 8 * (a - 1) * G * s_q, rel=1e-12)
    assert candidates(of)[0].schedule == "grid"


@pytest.mark.parametrize(
    ("P", "H_KV", "S_Q", "S_KV", "schedule"),
    [
        *((P, 1, S_Q, S_KV, "grid") for P in (4, 6, 16) for S_Q, S_KV in ((96, 96), (960, 96))),
        (8, 16, 96, 96, "ulysses"),
        (12, 12, 96, 960, "ulysses"),
        (8, 4, 96, 96, ""),
        (12, 8, 96, 96, ""),
    ],
)
def test_heads_and_then_a_grid_are_what_they_stand_for(
    P: int, H_KV: int, S_Q: int, S_KV: int, schedule: str
) -> None:
    of = planned((1, 2 * H_KV, S_Q, 32), (1, H_KV, S_KV, 32), P)
    nbytes = {c.schedule: c.nbytes for c in candidates(of) if not c.refused}
    found = teams(of)
    assert found == pytest.approx(nbytes[schedule] if schedule else found)
    assert found < 0.99 * min(nbytes.values()) or schedule
    assert found >= sum(lower_bound(of, backward=backward) for backward in (False, True))


@PASSES
@pytest.mark.parametrize(
    ("s_q", "s_kv"), [((9,), (7,)), ((0, 0), (3, 3)), ((2, 2), (0, 0)), ((5, 0), (4, 0))]
)
def test_nothing_is_sent_if_a_rank_has_all(
    s_q: tuple[int, ...], s_kv: tuple[int, ...], backward: bool
) -> None:
    of = planned((2, 4, sum(s_q), 8), (2, 2, sum(s_kv), 8), len(s_q))
    assert lower_bound(replace(of, s_q=s_q, s_kv=s_kv), backward=backward) == 0


def test_tables_in_docs_are_current() -> None:
    page = (ROOT / "docs" / "lower-bound.md").read_text()
    _, *tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert [table.rstrip() for table in tables] == [presets(), sweep()]
    last = [float(row.split(" | ")[-1].rstrip(" |")) for row in tables[1].splitlines()[2:]]
    assert f"{max(last)} is the worst" in page

"""Agreeing on who holds what, the order of the ring, and cutting and joining arrays."""

import copy
import pickle
import re
from dataclasses import replace
from itertools import product
from math import sqrt
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.common.pool import Pool
from lvxattn.common.validation import on_rank
from lvxattn.reference import Layout, Message, VirtualComm, run_ranks, shard, unshard
from tests.cases import Case
from tests.errors import says
from tests.judge import solve
from tests.launch import PROGRAMS, mpiexec
from tests.programs import shared
from tests.torch_ranks import forked

RANKS = pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 7])


def arrays(s_q: int = 2, s_kv: int = 3, **sizes: int) -> tuple[Any, Any, Any]:
    size = {"B": 1, "H": 4, "H_KV": 2, "D": 8, "D_V": 5, **sizes}
    return (
        np.zeros((size["B"], size["H"], s_q, size["D"])),
        np.zeros((size["B"], size["H_KV"], s_kv, size["D"])),
        np.zeros((size["B"], size["H_KV"], s_kv, size["D_V"])),
    )


def outcomes(P: int, fn: Any) -> list[Any]:
    """Return what each rank returned or raised; a rank that raises does not end the others."""

    def body(comm: VirtualComm) -> Any:
        try:
            return fn(comm)
        except (TypeError, ValueError) as error:
            return error

    return run_ranks(P, body)


def assert_same_error(errors: list[Any], kind: type[Exception], text: str) -> None:
    """Assert that all ranks have raised one error, of this type and with this text (a pattern)."""
    assert {(type(error), str(error)) for error in errors} == {(kind, str(errors[0]))}
    assert re.search(text, str(errors[0])), errors[0]


@RANKS
def test_agree_shares_all_lengths_and_sizes(P: int) -> None:
    def fn(comm: VirtualComm) -> Layout:
        return Layout.agree(*arrays(comm.rank, 3 * comm.rank % 5), comm, scale=0.5)

    layouts = run_ranks(P, fn)
    assert [layout.rank for layout in layouts] == list(range(P))
    for layout in layouts:
        assert replace(layout, rank=0) == layouts[0]
        assert layout.s_q == tuple(range(P))
        assert layout.s_kv == tuple(3 * r % 5 for r in range(P))
        assert (sum(layout.s_q), sum(layout.s_kv)) == (layout.S_Q, layout.S_KV)
        assert (layout.B, layout.H, layout.H_KV, layout.D, layout.D_V) == (1, 4, 2, 8, 5)
        assert (layout.dtype, layout.scale, layout.schedule) == ("float64", 0.5, "lv-xattn")
        assert layout.size == P


def test_scale_is_one_over_the_root_of_D_unless_given() -> None:
    layouts = run_ranks(2, lambda comm: Layout.agree(*arrays(), comm))
    assert {layout.scale for layout in layouts} == {1 / sqrt(8)}


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("float64", "float64"), ("float32", "float32"), ("float16", "float32")],
)
def test_accumulator_is_at_least_fp32(dtype: str, wide: str) -> None:
    given = [x.astype(dtype) for x in arrays()]
    layout = run_ranks(1, lambda comm: Layout.agree(*given, comm))[0]
    assert (layout.dtype, layout.accumulator) == (dtype, wide)


@pytest.mark.parametrize(
    ("hosts", "order", "crossings"),
    [
        ("aaaa", (0, 1, 2, 3), 0),
        ("aabb", (0, 1, 2, 3), 2),
        ("abab", (0, 2, 1, 3), 2),
        ("abcabc", (0, 3, 1, 4, 2, 5), 3),
        ("abbab", (0, 3, 1, 2, 4), 2),
        ("ba", (0, 1), 2),
        ("a", (0,), 0),
    ],
)
def test_ring_visits_host_by_host(hosts: str, order: tuple[int, ...], crossings: int) -> None:
    P = len(hosts)
    problem = Case("hosts", B=1, H=2, S_Q=9, S_KV=11, D=2).make()
    log: list[Message] = []

    def fn(comm: VirtualComm) -> Layout:
        solve(problem, comm, reference)
        part = problem.part(comm.rank, P)
        return Layout.agree(part["q"], part["k"], part["v"], comm)

    layouts = run_ranks(P, fn, hosts=list(hosts), log=log)
    assert [layout.order for layout in layouts] == [order] * P
    # Each of the P - 1 hops of either kind of block, forward and backward, crosses so often.
    crossed = sum(hosts[m.source] != hosts[m.dest] for m in log)
    assert crossed == 4 * (P - 1) * crossings


@RANKS
@pytest.mark.parametrize("cyclic", [False, True])
def test_neighbours_and_owners_are_consistent(P: int, cyclic: bool) -> None:
    hosts = ["ab"[r % 2] if cyclic else "a" for r in range(P)]
    layouts = run_ranks(P, lambda comm: Layout.agree(*arrays(), comm), hosts=hosts)
    for layout in layouts:
        assert layouts[layout.right].left == layout.rank
        assert layouts[layout.left].right == layout.rank
        assert layout.owner(0) == layout.owner(P) == layout.rank
        assert sorted(layout.owner(hop) for hop in range(P)) == list(range(P))
        for hop in range(P):
            # What is here after a hop was at the left neighbour's a hop before.
            assert layout.owner(hop + 1) == layouts[layout.left].owner(hop)


def test_view_places_a_block_among_all_queries_and_keys() -> None:
    layouts = run_ranks(4, lambda comm: Layout.agree(*arrays(comm.rank + 1, 10 - comm.rank), comm))
    mask = np.ones((1, 1, 1, 1), bool)
    for layout in layouts:
        for q_owner, kv_owner in product(range(4), repeat=2):
            view = layout.view(mask, q_owner, kv_owner)
            assert view.mask is mask
            assert view.q_start == (0, 1, 3, 6)[q_owner]
            assert view.kv_start == (0, 10, 19, 27)[kv_owner]
            assert view.column == 0


def test_home_keys_are_split_in_half() -> None:
    layouts = run_ranks(2, lambda comm: Layout.agree(*arrays(3, 10 * comm.rank), comm))
    assert [layout.home_cut for layout in layouts] == [0, 5]
    (alone,) = run_ranks(1, lambda comm: Layout.agree(*arrays(3, 10), comm))
    assert alone.home_cut == 10  # nothing travels: nothing to hide


def agreeing(given: dict[int, dict[str, Any]], **options: Any) -> Any:
    """Return what ranks agree on; `given` has, by rank, sizes, a dtype and options of its own."""

    def fn(comm: VirtualComm) -> Layout:
        mine = options | given.get(comm.rank, {})
        dtype, changed = mine.pop("dtype", "float64"), mine.pop("arrays", lambda *x: x)
        sizes = {name: mine.pop(name) for name in ("B", "H", "H_KV", "D", "D_V") if name in mine}
        return Layout.agree(*changed(*(x.astype(dtype) for x in arrays(**sizes))), comm, **mine)

    return fn


SIZES = {"B": ("q", 1, 2), "H": ("q", 4, 2), "H_KV": ("k", 2, 4), "D": ("q", 8, 4)}
SIZES |= {"D_V": ("v", 5, 4)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("odd", [1, 2])
def test_sizes_differing_between_ranks_raise_on_all(size: str, odd: int) -> None:
    argument, first, other = SIZES[size]
    text = f"{argument}: expected rank 0's {size} = {first}, got {size} = {other}"
    errors = outcomes(3, agreeing({odd: {size: other}}, scale=1.0))
    assert_same_error(errors, ValueError, f"^{text} \\(on rank {odd} of 3\\)$")


@pytest.mark.parametrize(
    ("fn", "kind", "text"),
    [
        (agreeing({2: {"dtype": "f4"}}), TypeError, says("q", "float64", "float32", rank=2, of=3)),
        (agreeing({1: {"scale": 0.25}, 2: {"scale": 0.25}}), ValueError,
         says("scale", 1 / sqrt(8), 0.25, rank=1, of=3)),
        (agreeing({n: {"mask": np.ones((m, 3), bool)} for n, m in enumerate((6, 2, 2))}),
         ValueError, says("mask", 6, (2, 3), rank=1, of=3)),
        (agreeing({1: {"mask": lambda b, h, q, kv: kv >= q}}, schedule="ring"), ValueError,
         "^mask: expected a callable on all ranks or on none with schedule 'ring', "
         r"got a callable where rank 0 has an array or None \(on rank 1 of 3\)$"),
        (agreeing({1: {"dtype": int}, 2: {"arrays": lambda q, k, v: (q[0], k, v)}}), TypeError,
         says("q", "int64", rank=1, of=3)),
        (agreeing({}, schedule="star"), ValueError,
         r"^schedule: expected one of \('lv-xattn', 'ring', 'grid', 'ulysses', 'gather', 'auto'\), "
         r"got 'star' \(on rank 0 of 3\)$"),
        (agreeing({}, queries="mirrored"), ValueError,
         r"^queries: expected one of \('sharded', 'replicated'\), got 'mirrored' "
         r"\(on rank 0 of 3\)$"),
        (agreeing({}, keys="mirrored"), ValueError,
         r"^keys: expected one of \('sharded', 'replicated'\), got 'mirrored' "
         r"\(on rank 0 of 3\)$"),
        (agreeing({}, keys="replicated", queries="replicated"), ValueError,
         "^keys: expected 'sharded' where queries are 'replicated', got 'replicated': every rank "
         r"would compute the same \(on rank 0 of 3\)$"),
        (agreeing({}, gradients="k"), ValueError,
         r"^gradients: expected one of \('qkv', 'q', 'kv'\), got 'k' \(on rank 0 of 3\)$"),
        *[
            (agreeing({1: {"mask": rule}}), kind, text)
            for rule, kind, text in (
                (lambda b, h, q, kv: kv * 0.5, TypeError, says("mask", "float64", rank=1, of=3)),
                (lambda b, h, q, kv: np.ones(2, bool), ValueError,
                 says("mask", (1, 1, 1, 1), (2,), rank=1, of=3)),
                (lambda b, h, q, kv: {}[1], ValueError, "^mask: expected a callable on global "
                 r"indices, got KeyError\(1\) from it \(on rank 1 of 3\)$"),
                (lambda b, h: b > h, TypeError,
                 r"^mask: raised TypeError\(.*\) \(on rank 1 of 3\)$"),
            )
        ],
    ],
    ids=["dtype", "scale", "queries of mask", "ring with a callable", "lowest rank", "schedule",
         "queries", "keys", "both replicated", "gradients", "rule's dtype", "rule's shape",
         "rule's KeyError", "rule's TypeError"],
)  # fmt: skip
def test_disagreement_raises_on_all_ranks(fn: Any, kind: type[Exception], text: str) -> None:
    assert_same_error(outcomes(3, fn), kind, text)


def test_callable_mask_is_tried_on_own_keys() -> None:
    asked: list[int] = []

    def rule(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        asked.append(int(kv_index[0]))
        return kv_index >= 0

    run_ranks(3, agreeing({1: {"mask": rule}}))
    assert asked == [3]  # rank 0 has keys 0 to 2


def test_different_calls_raise_on_all_ranks() -> None:
    problem = Case("calls").make()

    def fn(comm: VirtualComm) -> Any:
        q, k, v = problem.q, problem.k, problem.v
        if comm.rank == 1:
            out, lse = np.ones_like(problem.dout), np.ones(q.shape[:3])
            return reference.cross_attention_backward(problem.dout, q, k, v, out, lse, comm)
        return reference.cross_attention(q, k, v, comm)

    text = says("call", "'forward'", "'backward'", rank=1, of=2)
    assert_same_error(outcomes(2, fn), ValueError, text)


def test_a_scale_may_differ_in_the_last_bit() -> None:
    def fn(comm: VirtualComm) -> Layout:
        return Layout.agree(*arrays(), comm, scale=None if comm.rank else 8**-0.5)

    assert 1 / sqrt(8) != 8**-0.5
    assert {layout.scale for layout in run_ranks(2, fn)} == {8**-0.5}


def test_ranks_may_differ_in_mask_kind() -> None:
    masks = [None, np.ones((6, 3), bool), lambda b, h, q, k: k >= 0]
    layouts = run_ranks(3, lambda c: Layout.agree(*arrays(), c, mask=masks[c.rank]))
    assert [layout.s_q for layout in layouts] == [(2, 2, 2)] * 3


def test_nothing_is_sent_after_failed_agreement() -> None:
    log: list[Message] = []
    problem = Case("fails").make()

    def fn(comm: VirtualComm) -> Any:
        part = problem.part(comm.rank, 3)
        k = part["k"][0] if comm.rank == 2 else part["k"]
        try:
            return reference.cross_attention(part["q"], k, part["v"], comm)
        except ValueError as error:
            return str(error)

    (text,) = set(run_ranks(3, fn, log=log))
    assert re.search(says("k", (2, 33, 8), rank=2, of=3), text)
    assert log == []


@RANKS
def test_calls_with_a_layout_do_not_agree_again(P: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gathers: list[int] = []
    allgather = VirtualComm.allgather

    def counted(self: VirtualComm, sendobj: Any) -> Any:
        gathers.append(self.rank)
        return allgather(self, sendobj)

    monkeypatch.setattr(VirtualComm, "allgather", counted)
    problem = Case("reuse", mask="full").make()

    def fn(comm: VirtualComm, reuse: bool) -> None:
        part = problem.part(comm.rank, P)
        given = part["q"], part["k"], part["v"]
        options: dict[str, Any] = {"mask": part["mask"]}
        if reuse:
            options["layout"] = Layout.agree(*given, comm, **options)
        for _ in range(2):
            out, lse = reference.cross_attention(*given, comm, **options)
            reference.cross_attention_backward(part["dout"], *given, out, lse, comm, **options)

    run_ranks(P, fn, True)
    assert len(gathers) == (1 + 2) * P  # the agreement itself, and a look at lse in each backward
    gathers.clear()
    run_ranks(P, fn, False)
    assert len(gathers) == (4 + 2) * P  # an agreement for each call


def misfits() -> dict[str, Any]:
    q, k, v = arrays()
    good, out, lse = (q, k, v), np.zeros((1, 4, 2, 5)), np.zeros((1, 4, 2))
    short = {"backward": (out, out, lse[..., :1], None)}
    single = [x.astype("f4") for x in good]
    return {
        "B": (arrays(B=2), {}, ValueError, says("q", (1, 4, 2, 8), (2, 4, 2, 8))),
        "s_q": (
            arrays(3, 3), {}, ValueError,
            r"^q: expected the layout's shape \(1, 4, 2, 8\), got \(1, 4, 3, 8\) ",
        ),
        "s_kv": (arrays(2, 4), {}, ValueError, says("k", (1, 2, 3, 8), (1, 2, 4, 8))),
        "D_V": (arrays(D_V=6), {}, ValueError, says("v", (1, 2, 3, 5), (1, 2, 3, 6))),
        "dtype": (single, {}, TypeError, "^q: expected the layout's dtype float64, got float32 "),
        "scale": (
            good, {"scale": 0.5}, ValueError,
            f"^scale: expected the layout's {1 / sqrt(8)}, got 0.5 ",
        ),
        "mask": (good, {"mask": np.ones((2, 3))}, ValueError, says("mask", 4, (2, 3))),
        "mask of ring": (
            good, {"schedule": "ring", "mask": np.ones((1, 1, 1, 3), bool)}, ValueError,
            r"^mask: expected the layout's array mask \(shape, dtype\): None, got ",
        ),
        "rule of ring": (
            good, {"schedule": "ring", "mask": lambda b, h, q, kv: kv >= 0}, ValueError,
            "^mask: expected a callable only if the layout was agreed with one, got function ",
        ),
        "axes": ((q[0], k, v), {}, ValueError, says("q", (4, 2, 8))),
        "lse": (good, short, ValueError, says("lse", (1, 4, 2), (1, 4, 1))),
    }  # fmt: skip


@pytest.mark.parametrize(("given", "options", "kind", "text"), misfits().values(), ids=misfits())
def test_layout_misfit_raises_on_its_rank_only(
    given: Any, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    agreed = {"schedule": options.get("schedule", "lv-xattn")}
    given_to_check = {name: x for name, x in options.items() if name != "schedule"}

    def fn(comm: VirtualComm) -> Any:
        layout = Layout.agree(*arrays(), comm, **agreed)
        if comm.rank == 1:
            return layout.check(*given, comm, **given_to_check)
        return layout.check(*arrays(), comm, scale=8**-0.5)  # not 1 / sqrt(8) to the last bit

    fits, error = outcomes(2, fn)
    assert fits is None
    assert_same_error([error], kind, rf"{text}.*\(on rank 1 of 2\)$")


def test_layout_of_another_communicator_raises() -> None:
    layouts = run_ranks(2, lambda comm: Layout.agree(*arrays(), comm))
    text = "layout: expected the communicator it was agreed on, with this as rank {} of 2, got rank"
    swapped = outcomes(2, lambda comm: layouts[1 - comm.rank].check(*arrays(), comm))
    assert [str(x) for x in swapped] == [
        f"{text.format(1)} 0 of 2 (on rank 0 of 2)", f"{text.format(0)} 1 of 2 (on rank 1 of 2)",
    ]  # fmt: skip
    smaller = outcomes(1, lambda comm: layouts[0].check(*arrays(), comm))
    assert str(smaller[0]) == f"{text.format(0)} 0 of 1 (on rank 0 of 1)"


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_calls_check_arguments_against_layout(which: str) -> None:
    def fn(comm: VirtualComm) -> None:
        layout = Layout.agree(*arrays(), comm)
        q, k, v = arrays(3, 3)
        out, lse = np.zeros((1, 4, 3, 5)), np.zeros((1, 4, 3))
        if which == "forward":
            reference.cross_attention(q, k, v, comm, layout=layout)
        else:
            reference.cross_attention_backward(out, q, k, v, out, lse, comm, layout=layout)

    with pytest.raises(ValueError, match=says("q", (1, 4, 2, 8), (1, 4, 3, 8))):
        run_ranks(1, fn)


@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_text_grows_while_keys_stay(P: int) -> None:
    """Real ranks do the same in `run_calls.py` and `torch_calls.py`."""
    found = run_ranks(P, lambda comm: shared.text_grows_while_keys_stay(comm, reference))
    assert all(verdicts and all(verdicts) for verdicts in found)


@pytest.mark.parametrize(
    ("queries", "given", "options", "kind", "text"),
    [
        ("sharded", (3, 3), {}, ValueError,
         r"^s_q: expected 3 numbers of queries, by rank, got \(3, 3\) \(on rank 0 of 3\)$"),
        ("sharded", 3, {}, ValueError, "^s_q: expected 3 numbers of queries, by rank, got 3 "),
        ("sharded", (3, -1, 3), {}, ValueError, r"^s_q: expected 3 numbers .*, got \(3, -1, 3\) "),
        ("sharded", (3, True, 3), {}, ValueError, "^s_q: expected 3 numbers "),
        ("replicated", (3, 3, 3), {}, ValueError, "^s_q: expected a number of queries, got "),
        ("replicated", 2.0, {}, ValueError, "^s_q: expected a number of queries, got 2.0 "),
        ("replicated", 3, {"rule": max}, TypeError,
         "^rule: expected a Rule or None, got builtin_function_or_method "),
        ("replicated", 3, {"rule": reference.Segments((4,), (9,))}, ValueError, "^mask: .*4"),
    ],
)  # fmt: skip
def test_other_queries_are_checked(
    queries: str, given: Any, options: Any, kind: type[Exception], text: str
) -> None:
    def fn(comm: VirtualComm) -> None:
        layout = Layout.agree(*arrays(), comm, queries=queries)
        layout.with_queries(given, comm, **options)

    assert_same_error(outcomes(3, fn), kind, text)


def test_other_queries_are_checked_on_all_ranks() -> None:
    """One rank's error is raised on all; numbers may be NumPy's."""

    def fn(comm: VirtualComm) -> Any:
        layout = Layout.agree(*arrays(), comm)
        right = layout.with_queries(np.array([3, 2, 1]), comm)
        assert right.s_q == (3, 2, 1)
        layout.with_queries((3, 2, -comm.rank), comm)

    text = r"^s_q: expected 3 numbers of queries, by rank, got \(3, 2, -1\) \(on rank 1 of 3\)$"
    assert_same_error(outcomes(3, fn), ValueError, text)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("implementation", "way", "difference"),
    [
        ("mpi_impl", "lv-xattn", 1), ("mpi_impl", "gather", 1), ("mpi_impl", "gather", -1),
        ("mpi_impl", "replicated", 1), ("torch_impl", "lv-xattn", -1),
        ("torch_impl", "gather", 1), ("torch_impl", "replicated", -1),
        ("mpi_impl", "rule", 0), ("torch_impl", "rule", 0),
    ],
)  # fmt: skip
def test_other_queries_that_ranks_do_not_share_raise(
    implementation: str, way: str, difference: int
) -> None:
    """In time, and nobody gets results."""
    program = PROGRAMS / "wrong_queries.py", way, str(difference)
    if implementation == "torch_impl":
        pytest.importorskip("torch")
        ended = forked(3, *program, timeout=60)
    else:
        ended = mpiexec(3, *program, timeout=60)
    assert not ended.timed_out
    assert ended.status != 0
    assert not ended.left
    assert not ended.out
    name = r"\(\d, \d, \d\)"
    error = rf"ValueError: s_q: expected rank 0's {name}, got {name} \(on rank 1 of 3\)"
    if way == "rule":
        error = r"ValueError: rule: expected rank 0's \(\), got \(Causal\(.*\(on rank 1 of 3\)"
    assert re.search(error, ended.err)


def test_other_queries_need_the_layouts_communicator() -> None:
    layouts = run_ranks(3, lambda comm: Layout.agree(*arrays(), comm))
    text = "layout: expected the communicator it was agreed on, with this as rank 1 of 3, got rank"

    def fn(comm: VirtualComm) -> None:
        layouts[1].with_queries([1, 1, 1], comm)

    errors = outcomes(1, fn)
    assert_same_error(errors, ValueError, f"^{text} 0 of 1")
    with pytest.raises(TypeError, match=r"^comm: expected a communicator, got NoneType"):
        layouts[1].with_queries([1, 1, 1], None)  # type: ignore[arg-type]


def test_layouts_for_other_queries_share_buffers() -> None:
    def fn(comm: VirtualComm) -> tuple[Layout, Layout]:
        layout = Layout.agree(*arrays(), comm)
        return layout, layout.with_queries([7], comm)

    ((layout, longer),) = run_ranks(1, fn)
    assert longer == replace(layout, s_q=(7,))
    assert longer.pool is layout.pool


def test_checks_by_a_layout_for_other_queries_gather_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gathers: list[int] = []
    allgather = VirtualComm.allgather

    def counted(self: VirtualComm, sendobj: Any) -> Any:
        gathers.append(self.rank)
        return allgather(self, sendobj)

    def fn(comm: VirtualComm) -> None:
        layout = Layout.agree(*arrays(), comm).with_queries([1] * comm.size, comm)
        for _ in range(3):
            layout.check(*arrays(1), comm)

    monkeypatch.setattr(VirtualComm, "allgather", counted)
    run_ranks(3, fn)
    assert sorted(gathers) == [0, 0, 1, 1, 2, 2]  # the agreement, and one comparison


def test_other_rules_on_ranks_raise_on_all() -> None:
    def fn(comm: VirtualComm) -> None:
        layout = Layout.agree(*arrays(), comm)
        rule = reference.Causal(comm.rank // 2)
        layout.with_queries([2] * 3, comm, rule=rule)

    text = r"^rule: expected rank 0's .*Causal.*0.*, got .*1.* \(on rank 2 of 3\)$"
    assert_same_error(outcomes(3, fn), ValueError, text)


def test_a_pool_grows_with_what_is_in_use() -> None:
    """However text grows beside long keys, and also where short and long text take turns."""
    pool, made = Pool(), []

    def make(nbytes: int) -> bytearray:
        made.append(nbytes)
        return bytearray(nbytes)

    def call(*sizes: int) -> None:
        taken = [pool.take("host", n, make) for n in sizes]
        assert all(len(x.buffer) >= n for x, n in zip(taken, sizes, strict=True))
        for kept in taken:
            pool.give(kept)

    keys = 10**6
    for length in (*range(10_000, 40_000, 100), *([800, 30_000] * 20)):
        call(length, length, 2 * length, keys, keys)
        assert sum(x.nbytes for x in pool.at_rest["host"]) < 2 * keys + 2 * 4 * 40_000 * 9 / 8
    assert len(made) < 60
    assert len(pool.take("device", 8, make).buffer) == 8


def test_a_copied_layout_has_no_buffers() -> None:
    (layout,) = run_ranks(1, lambda comm: Layout.agree(*arrays(), comm))
    layout.pool.give(layout.pool.take("host", 10**6, bytearray))
    for copied in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert copied == layout
        assert copied.pool.at_rest == {}
        assert copied.pool.keeps
    assert len(pickle.dumps(layout)) < 10_000


@RANKS
@pytest.mark.parametrize("length", [0, 1, 6, 7, 11])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_unshard_inverts_shard(P: int, length: int, axis: int) -> None:
    shape = [2, 3, 4]
    shape[axis] = length
    x = np.arange(np.prod(shape)).reshape(shape)

    def fn(comm: VirtualComm) -> Any:
        part = shard(x, comm, axis)
        assert part.base is not None  # a view
        return part.shape[axis], unshard(part, comm, axis)

    results = run_ranks(P, fn)
    assert [n for n, _ in results] == [length // P + (r < length % P) for r in range(P)]
    assert all(np.array_equal(joined, x) for _, joined in results)


def test_shard_cuts_the_length_by_default() -> None:
    x = np.zeros((2, 4, 6, 8))

    def fn(comm: VirtualComm) -> Any:
        part = shard(x, comm)
        return part.shape, unshard(part, comm).shape

    assert run_ranks(2, fn) == [((2, 4, 3, 8), x.shape)] * 2


@RANKS
def test_unshard_joins_in_rank_order(P: int) -> None:
    def fn(comm: VirtualComm) -> Any:
        return unshard(np.full((1, 1, 3 * comm.rank % 4, 1), comm.rank), comm)

    want = [r for r in range(P) for _ in range(3 * r % 4)]
    assert [x.ravel().tolist() for x in run_ranks(P, fn)] == [want] * P


@pytest.mark.parametrize(
    ("odd", "got"),
    [
        (np.zeros((2, 4, 1)), "(2, 4, 1) and float64"),
        (np.zeros((2, 3, 1), "f4"), "(2, 3, 1) and float32"),
    ],
)
def test_unshard_misfit_raises_on_all_ranks(odd: Any, got: str) -> None:
    def fn(comm: VirtualComm) -> Any:
        return unshard(odd if comm.rank == 1 else np.zeros((2, 3, 5)), comm)

    text = f"x: expected rank 0's shape (2, 3, 5) but for axis 2, and dtype float64, got {got}"
    for error in outcomes(3, fn):
        assert (type(error), str(error)) == (ValueError, f"{text} (on rank 1 of 3)")


def test_on_rank_keeps_the_type() -> None:
    error = on_rank(TypeError("x"), 3, 5)
    assert (type(error), str(error)) == (TypeError, "x (on rank 3 of 5)")

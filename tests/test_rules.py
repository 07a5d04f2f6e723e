"""Masks that know their own structure: what they hide is neither computed nor sent."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvxattn import mpi_impl, reference, torch_impl
from lvxattn.common import rules
from lvxattn.common.rules import Both, Rule, visible_parts
from lvxattn.common.segments import Causal, Segments
from lvxattn.plan.choose import candidates
from lvxattn.plan.memory import call_memory
from lvxattn.plan.steps import messages
from lvxattn.reference import Layout, full_attention, full_attention_backward, run_ranks, shard

# Documents of text, each after its own image: lengths drawn once.
TEXTS = (117, 185, 43, 65, 148, 129, 56, 132)
IMAGES = (1732, 2204, 1089, 2671, 1500, 2950, 1333, 2101)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Rule, int, int]:
    """Return a rule, S_Q and S_KV."""
    lengths = st.integers(0, 40)
    documents = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=7))
    q_lengths, kv_lengths = (tuple(x) for x in zip(*documents, strict=True))
    segments = Segments(q_lengths, kv_lengths, earlier=draw(st.booleans()))
    causal = Causal(draw(st.integers(-50, 50)))
    rule = draw(st.sampled_from([segments, causal, segments & causal]))
    return rule, sum(q_lengths), sum(kv_lengths)


def shown(rule: Rule, S_Q: int, S_KV: int) -> Any:
    """Return the whole mask."""
    zero = np.zeros((1, 1), int)
    mask = rule(zero, zero, np.arange(S_Q)[:, None], np.arange(S_KV))
    return np.broadcast_to(mask, (S_Q, S_KV))


@pytest.mark.parametrize("smallest", [1, 4, 256])
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_parts_hold_every_visible_pair_once(smallest: int, problem: tuple[Rule, int, int]) -> None:
    rule, S_Q, S_KV = problem
    mask, times = shown(rule, S_Q, S_KV), np.zeros((S_Q, S_KV), int)
    whole_block = slice(0, S_Q), slice(0, S_KV)
    for rows, keys, whole in visible_parts(rule, *whole_block, smallest=smallest):
        times[rows, keys] += 1
        assert not whole or mask[rows, keys].all()
    assert times.max(initial=0) <= 1
    assert times[mask].all()
    if smallest == 1:  # cut to the end: nothing that is hidden is left
        assert not times[~mask].any()


@pytest.mark.parametrize(
    ("rule", "S_Q", "S_KV"),
    [
        (Segments(TEXTS, IMAGES), sum(TEXTS), sum(IMAGES)),
        (Segments(TEXTS, IMAGES, earlier=True), sum(TEXTS), sum(IMAGES)),
        (Causal(), 4096, 4096),
        (Causal(65536 - 512), 512, 65536),
        (Segments([2000] * 4, [2000] * 4) & Causal(), 8000, 8000),
    ],
)
def test_scores_computed_are_within_a_tenth_of_those_shown(rule: Rule, S_Q: int, S_KV: int) -> None:
    parts = list(visible_parts(rule, slice(0, S_Q), slice(0, S_KV)))
    computed = sum((x.stop - x.start) * (y.stop - y.start) for x, y, _ in parts)
    visible = int(shown(rule, S_Q, S_KV).sum())
    assert visible <= computed <= 1.1 * visible


class Torch:
    """`torch_impl`'s block attention on NumPy arrays."""

    @staticmethod
    def block_attention(*arrays: Any, **options: Any) -> Any:
        import torch

        results = torch_impl.block_attention(*map(torch.from_numpy, arrays), **options)
        return [x.numpy() for x in results]

    @staticmethod
    def block_attention_backward(*arrays: Any, **options: Any) -> Any:
        import torch

        # dk and dv share their memory with the arrays.
        dq, *_ = torch_impl.block_attention_backward(*map(torch.from_numpy, arrays), **options)
        return dq.numpy()


@pytest.mark.parametrize("smallest", [4, 256])
@pytest.mark.parametrize("implementation", [reference, mpi_impl, Torch])
@settings(max_examples=20, deadline=None)
@given(problem=problems(), shift=st.integers(0, 5))
def test_block_attention_is_exact(
    implementation: Any, smallest: int, problem: tuple[Rule, int, int], shift: int
) -> None:
    """Also of a block that begins in the middle of the problem."""
    rule, S_Q, S_KV = problem
    rng = np.random.default_rng(S_Q)
    q, dout = rng.standard_normal((2, 2, 4, S_Q, 8))
    k, v = rng.standard_normal((2, 2, 2, S_KV, 8))
    rows, keys = slice(min(shift, S_Q), S_Q), slice(min(2 * shift, S_KV), S_KV)
    mask = np.zeros((S_Q, S_KV), bool)
    mask[rows, keys] = shown(rule, S_Q, S_KV)[rows, keys]
    out, lse = full_attention(q, k, v, mask=mask)
    wanted = full_attention_backward(dout, q, k, v, out, lse, mask=mask)
    delta = (dout * out).sum(axis=-1)
    view = rules_view(rule, rows.start, keys.start)
    q, dout, out, lse, delta = (x[:, :, rows] for x in (q, dout, out, lse, delta))
    k, v = k[:, :, keys], v[:, :, keys]
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "SMALLEST", smallest)
        found = implementation.block_attention(q, k, v, scale=8**-0.5, mask=view)
        dq = implementation.block_attention_backward(
            dout, q, k, v, lse, delta, dk, dv, scale=8**-0.5, mask=view
        )
    for x, y in zip(found, (out, lse), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
    for x, y, part in zip((dq, dk, dv), wanted, (rows, keys, keys), strict=True):
        np.testing.assert_allclose(x, y[:, :, part], rtol=1e-11, atol=1e-12)


def rules_view(rule: Rule, q_start: int, kv_start: int) -> Any:
    from lvxattn.common.masks import MaskView

    return MaskView(rule, q_start, kv_start)


class NeverCalled(Segments):
    """Documents whose mask is not to be evaluated, but for one pair as ranks agree."""

    def __call__(self, b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        assert q_index.size == kv_index.size == 1
        return super().__call__(b, h, q_index, kv_index)


def test_mask_of_large_documents_is_not_evaluated() -> None:
    rule = NeverCalled((300, 200), (400, 500))
    q, k = np.zeros((1, 1, 500, 2)), np.zeros((1, 1, 900, 2))

    def attend(comm: reference.VirtualComm) -> float:
        q_part, k_part = shard(q, comm), shard(k, comm)
        _, lse = reference.cross_attention(q_part, k_part, k_part, comm, mask=rule)
        return float(np.exp(lse).sum())

    assert sum(run_ranks(3, attend)) == pytest.approx(300 * 400 + 200 * 500)


def sent(rule: Rule | None, schedule: str, *, backward: bool, S_Q: int, S_KV: int) -> int:
    """Return the bytes that 4 ranks send by the plan, which other tests hold against the meter."""
    q, k = np.zeros((1, 1, S_Q, 8), np.float32), np.zeros((1, 1, S_KV, 8), np.float32)

    def agree(comm: reference.VirtualComm) -> int:
        q_part, k_part = shard(q, comm), shard(k, comm)
        layout = Layout.agree(q_part, k_part, k_part, comm, schedule=schedule, mask=rule)
        return sum(message.nbytes for message in messages(layout, comm.rank, backward=backward))

    return sum(run_ranks(4, agree))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("schedule", ["lv-xattn", "ring"])
class TestBytes:
    def test_interleaved_documents_send_at_most_a_third(
        self, schedule: str, backward: bool
    ) -> None:
        sizes = {"S_Q": sum(TEXTS), "S_KV": sum(IMAGES), "backward": backward}
        less = sent(Segments(TEXTS, IMAGES), schedule, **sizes)
        assert 0 < less <= sent(None, schedule, **sizes) / 3

    def test_documents_that_lie_on_one_rank_send_nothing(
        self, schedule: str, backward: bool
    ) -> None:
        rule = Segments([10] * 8, [100] * 8)
        assert sent(rule, schedule, S_Q=80, S_KV=800, backward=backward) == 0

    def test_rows_of_other_documents_stay(self, schedule: str, backward: bool) -> None:
        """Only rank 0's last query, or rank 1's first key, meets something on another rank."""
        rule = Segments([9, 11, 10, 10], [10] * 4) if schedule == "lv-xattn" else None
        rule = rule or Segments([10] * 4, [11, 9, 10, 10])
        got = sent(rule, schedule, S_Q=40, S_KV=40, backward=backward)
        one = sent(None, schedule, S_Q=4, S_KV=4, backward=backward) // (4 * 3)
        assert got == one  # one row there and its result back, of 4 x 3 rows and results


def test_rule_that_differs_between_ranks_is_refused_where_keys_travel() -> None:
    x = np.zeros((1, 1, 4, 2))

    def attend(comm: reference.VirtualComm) -> None:
        reference.cross_attention(x, x, x, comm, schedule="ring", mask=Causal(comm.rank))

    with pytest.raises(ValueError, match=r"mask: expected rank 0's Causal\(offset=0\).*on rank 1"):
        run_ranks(2, attend)


def test_ranks_may_differ_in_rules_where_queries_travel() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 1, 8, 4))
    masks = [Segments((4, 4), (4, 4)), None]
    mask = np.ones((8, 8), bool)
    mask[:, :4] = shown(masks[0], 8, 8)[:, :4]
    out, _ = full_attention(q, k, v, mask=mask)

    def attend(comm: reference.VirtualComm) -> Any:
        parts = [shard(x, comm) for x in (q, k, v)]
        return reference.cross_attention(*parts, comm, mask=masks[comm.rank])[0]

    np.testing.assert_allclose(np.concatenate(run_ranks(2, attend), axis=2), out, atol=1e-14)


@pytest.mark.parametrize("other", [None, Segments((2, 2), (1, 3)), lambda *index: index[2] >= 0])
def test_layout_refuses_another_rule(other: Any) -> None:
    x = np.zeros((1, 1, 4, 2))

    def attend(comm: reference.VirtualComm) -> None:
        layout = Layout.agree(x, x, x, comm, mask=Segments((2, 2), (2, 2)))
        reference.cross_attention(x, x, x, comm, mask=other, layout=layout)

    with pytest.raises(ValueError, match=r"mask: expected the layout's Segments\(q_lengths=\(2, 2"):
        run_ranks(1, attend)


@dataclass(frozen=True)
class ByHead(Rule):
    """Head h sees the first 2 h + 2 keys; says nothing of its structure."""

    def __call__(self, b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        return (kv_index < 2 * h + 2) & (q_index >= 0)

    def sees(self, rows: slice, keys: slice) -> bool | None:
        return None


@pytest.mark.parametrize("schedule", ["lv-xattn", "ring", "gather", "ulysses"])
def test_rule_may_differ_by_head(schedule: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 4, 10, 4))
    wanted, _ = full_attention(q, k, v, mask=ByHead())

    def attend(comm: reference.VirtualComm) -> Any:
        parts = [shard(x, comm) for x in (q, k, v)]
        return reference.cross_attention(*parts, comm, mask=ByHead(), schedule=schedule)[0]

    np.testing.assert_allclose(np.concatenate(run_ranks(2, attend), axis=2), wanted, atol=1e-14)


def test_plan_counts_all_ranks_and_lets_auto_take_the_ring() -> None:
    """Rank 0 sends nothing, the others do; and equal rules are no reason against the ring."""
    q, k = np.zeros((1, 1, 4096, 8)), np.zeros((1, 1, 64, 8))
    rule = Segments((1024, 3072), (16, 48))

    def agree(comm: reference.VirtualComm) -> Any:
        q_part, k_part = shard(q, comm), shard(k, comm)
        return Layout.agree(q_part, k_part, k_part, comm, schedule="auto", mask=rule)

    layout = run_ranks(4, agree)[0]
    assert layout.schedule == "ring"
    by_schedule = {c.schedule: c for c in candidates(layout)}
    for schedule in ("lv-xattn", "ring"):
        chosen = replace(layout, schedule=schedule)
        sent = [
            sum(m.nbytes for b in (False, True) for m in messages(chosen, rank, backward=b))
            for rank in range(4)
        ]
        assert sent[0] == 0
        assert by_schedule[schedule].nbytes == max(sent) > 0


def test_memory_of_documents_on_one_rank_is_that_of_results() -> None:
    q, k = np.zeros((1, 1, 8, 8)), np.zeros((1, 1, 4096, 8))

    def least(comm: reference.VirtualComm, rule: Rule | None, schedule: str) -> list[int]:
        q_part, k_part = shard(q, comm), shard(k, comm)
        layout = Layout.agree(q_part, k_part, k_part, comm, schedule=schedule, mask=rule)
        return call_memory(layout)

    for schedule in ("lv-xattn", "ring"):
        documents = run_ranks(4, least, Segments([2] * 4, [1024] * 4), schedule)[0]
        alone = run_ranks(1, least, None, schedule)[0][0]
        assert documents == [alone / 4] * 4


class Unpicklable(Causal):
    """Holds a function that no other process could be sent."""

    def __getstate__(self) -> Any:
        raise TypeError("cannot pickle this")


class Incomparable(Rule):
    """Has no == of its own: what another process gets is never equal."""

    def __call__(self, b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        return q_index >= kv_index

    def sees(self, rows: slice, keys: slice) -> bool | None:
        return None


@dataclass(frozen=True)
class OfArrays(Causal):
    """Its == returns an array."""

    lengths: Any = field(default_factory=lambda: np.arange(3))


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (Incomparable(), "mask: expected a Rule that compares by =="),
        (OfArrays(), "mask: expected a Rule that compares by =="),
        (Segments((3, 2), (2, 2)), "mask: expected Segments whose q_lengths sum to 4, got 5"),
        (Causal() & Segments((4,), (3,)), "mask: expected Segments whose kv_lengths sum to 4"),
        (Unpicklable(), "mask: expected a Rule that can be pickled"),
    ],
)
def test_rule_that_does_not_fit_is_refused(rule: Rule, named: str) -> None:
    x = np.zeros((1, 1, 4, 2))
    with pytest.raises((ValueError, TypeError), match=named):
        run_ranks(1, lambda comm: reference.cross_attention(x, x, x, comm, mask=rule))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Segments((1, 2), (3,)), "kv_lengths: expected one for each of the 2 documents"),
        (lambda: Segments((1, -2), (3, 1)), "q_lengths: expected lengths of 0 or more, got -2"),
        (lambda: Segments.from_cu_seqlens([1, 2], [0, 2]), "cu_seqlens_q: expected 0 and then"),
        (lambda: Segments.from_cu_seqlens([0, 2], [0, 2, 1]), "cu_seqlens_k: expected 0 and then"),
        (lambda: Segments.from_position_ids([0], [1, 0]), "kv_positions: expected one row"),
        (lambda: Segments.from_position_ids([[0], [0]], [0]), "q_positions: expected one row"),
    ],
)
def test_bad_documents_are_refused(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_full_attention_refuses_documents_of_other_lengths() -> None:
    x = np.zeros((1, 1, 8, 2))
    with pytest.raises(ValueError, match="mask: expected Segments whose q_lengths sum to 8, got 4"):
        full_attention(x, x, x, mask=Segments((4,), (8,)))


def test_documents_of_arrays() -> None:
    import torch

    wanted = Segments((4, 0, 2), (3, 1, 5))
    ends = [0, 4, 4, 6], [0, 3, 4, 9]
    for array in (list, np.array, torch.tensor):
        assert Segments.from_cu_seqlens(*map(array, ends)) == wanted  # type: ignore[arg-type]
    positions = torch.tensor([[0, 1, 2, 0]]), np.array([0, 0, 1, 2])
    assert Segments.from_position_ids(*positions) == Segments((3, 1), (1, 3))


def test_both_is_what_neither_hides() -> None:
    rule = Segments((3, 3), (3, 3)) & Causal()
    assert isinstance(rule, Both)
    assert (shown(rule, 6, 6) == np.kron(np.eye(2), np.tri(3)).astype(bool)).all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Segments([2.7, 3.3], [4, 4]), "q_lengths: expected whole numbers, got .2.7, 3.3."),
        (lambda: Segments((2, 3), 9), "kv_lengths: expected whole numbers, got 9"),
        (lambda: Segments("33", (4, 5)), "q_lengths: expected whole numbers, got '33'"),
        (lambda: Causal(1.5), "offset: expected a whole number, got 1.5"),
    ],
)
def test_lengths_and_offsets_are_whole_numbers(make: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"^{text}$"):
        make()


def test_lengths_may_be_of_any_library() -> None:
    assert Segments(np.array([2, 3]), [np.int64(4), 5]) == Segments((2, 3), (4, 5))

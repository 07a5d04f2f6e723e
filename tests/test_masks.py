"""What a block may see: cutting tiles out of a rank's mask."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvxattn.common.masks import MaskView, tiles
from tests.cases import MASKS, Case

B, H, S_Q, S_KV = 2, 4, 12, 15
ALL = slice(0, B), slice(0, H)


def whole(mask: Any) -> Any:
    """Return a mask in full size."""
    if callable(mask):
        mask = mask(*np.ix_(*(np.arange(n) for n in (B, H, S_Q, S_KV))))
    return np.broadcast_to(mask, (B, H, S_Q, S_KV))


def slices(length: int) -> st.SearchStrategy[slice]:
    bounds = st.lists(st.integers(0, length), min_size=2, max_size=2).map(sorted)
    return bounds.map(lambda pair: slice(*pair))


@cache
def mask_of(kind: str) -> Any:
    return Case("tile", B=B, H=H, S_Q=S_Q, S_KV=S_KV, mask=kind).make().mask


@pytest.mark.parametrize("kind", [name for name in MASKS if name != "none"])
@settings(max_examples=50)
@given(
    rows=slices(S_Q), keys=slices(S_KV), batches=slices(B), heads=slices(H),
    q_start=st.integers(0, S_Q), first=st.integers(0, S_KV), skipped=st.integers(0, S_KV),
)  # fmt: skip
def test_tile_is_the_part_of_the_whole_mask(
    kind: str, rows: slice, keys: slice, batches: slice, heads: slice,
    q_start: int, first: int, skipped: int,
) -> None:  # fmt: skip
    mask = mask_of(kind)
    want = whole(mask)[:, :, q_start:, first:][..., skipped:][batches, heads, rows, keys]
    # The rank holds the keys from `first` on; an array mask has their columns alone.
    held = mask if callable(mask) else mask[..., first:]
    view = MaskView(held, q_start=q_start, kv_start=first).from_key(skipped)
    # A tile lies within its block.
    rows = slice(min(rows.start, S_Q - q_start), min(rows.stop, S_Q - q_start))
    length = max(0, S_KV - first - skipped)
    keys = slice(min(keys.start, length), min(keys.stop, length))
    tile = view.tile(batches, heads, rows, keys, np.arange)
    assert tile is not None
    assert tile.ndim == 4
    got = np.broadcast_to(
        tile,
        tuple(s.stop - s.start for s in (batches, heads, rows, keys)),
    )
    assert np.array_equal(got, want)


def test_no_mask_has_no_tiles() -> None:
    assert MaskView(None, 3, 4, 5).tile(*ALL, slice(0, 2), slice(0, 2), np.arange) is None


def test_view_of_a_view_and_of_a_mask() -> None:
    mask = np.ones((1, 1, 1, 5), bool)
    view = MaskView(mask, 1, 2, 3)
    assert MaskView.of(view) is view
    assert MaskView.of(mask) == MaskView(mask, q_start=0, kv_start=0, column=0)


def test_from_key_moves_start_and_column() -> None:
    view = MaskView(None, q_start=1, kv_start=20, column=3).from_key(4)
    assert (view.q_start, view.kv_start, view.column) == (1, 24, 7)


def test_callable_mask_is_called_for_its_tile_only() -> None:
    asked: list[Any] = []

    def rule(*indices: Any) -> Any:
        asked.append(np.broadcast_shapes(*(i.shape for i in indices)))
        return np.ones((1, 1), bool)

    MaskView(rule).tile(slice(0, 1), slice(1, 3), slice(2, 5), slice(3, 7), np.arange)
    assert asked == [(1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("returned", "named"),
    [(np.ones(3), "float64"), (np.ones(3, int), "int64"), (True, "True, which is not an array")],
)
def test_callable_mask_must_return_bool(returned: Any, named: str) -> None:
    view = MaskView(lambda b, h, q_index, kv_index: returned)
    with pytest.raises(TypeError) as raised:
        view.tile(*ALL, slice(0, 1), slice(0, 3), np.arange)
    assert str(raised.value) == (
        f"mask: expected mask(b, h, q_index, kv_index) to return a bool array, got {named}"
    )


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 1, 1, 1, 3)])
def test_callable_mask_must_return_broadcastable_shape(shape: tuple[int, ...]) -> None:
    view = MaskView(lambda b, h, q_index, kv_index: np.ones(shape, bool))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        view.tile(*ALL, slice(0, 1), slice(0, 3), np.arange)
    assert "to return what broadcasts to its indices'" in str(raised.value)
    assert str(raised.value).endswith(f"got shape {shape}")


@given(length=st.integers(0, 50), size=st.integers(1, 60))
def test_tiles_cover_the_length_in_order(length: int, size: int) -> None:
    parts = list(tiles(length, size))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))
    assert all(0 < part.stop - part.start <= size for part in parts)

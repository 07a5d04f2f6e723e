"""The order in which ranks start their transfers: none waits for one that comes after it.

The schedules run without arrays and without ranks.  What each rank starts is recorded, and then
completed as strictly as any transport does: together, in each rank's order.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from lvxattn.common.exchange_base import BufferedRotation, ExchangeBase, Leg
from lvxattn.common.layout import Layout
from lvxattn.common.rules import Rule
from lvxattn.common.wire import KEYS_VALUES, QUERIES, QUERY_BLOCKS, Kind
from lvxattn.mpi_impl import grid, lv_xattn, ring_attention
from lvxattn.plan import planned

PASSES = {
    "lv-xattn": (lv_xattn.lv_xattn, lv_xattn.lv_xattn_backward),
    "ring": (ring_attention.ring_attention, ring_attention.ring_attention_backward),
    "grid": (grid.grid, grid.grid_backward),
}
SHAPES = [(a, b) for a in range(1, 7) for b in range(1, 6) if a * b <= 20]


class Nothing:
    """Stands for an array."""

    def __iadd__(self, _other: object) -> "Nothing":
        return self

    def copy(self) -> "Nothing":
        return self


class Op(NamedTuple):
    """One end of a transfer: what this rank does with whom, and which block it is."""

    sends: bool
    other: int
    block: tuple[Any, ...]
    nbytes: int


class Recorded(BufferedRotation):
    """Starts nothing, and has received whatever it has started to receive."""

    def _allocate(self) -> object:
        self.buffers.append(object())
        return self.buffers[-1]

    def _load(self, held: object, leg: Leg, _arrays: Any) -> None:
        self.loaded[leg.start] = held

    def wait_sent(self, held: object) -> None:
        self.sending.pop(held, None)

    def receive(self, hop: int) -> list[Nothing]:
        self.here = self.receiving.pop(hop)  # a KeyError if it was not started
        counts = {QUERIES: 1, QUERY_BLOCKS: 4, KEYS_VALUES: 2}
        fields = self.kind.fields(self.layout, self.comes[hop].owner)
        self.arrays = [Nothing() for _ in range(counts.get(self.kind, len(fields)))]
        return self.arrays

    def start(self, stop: int, legs: list[Leg]) -> None:
        batch = []
        if stop in self.comes:
            self.receiving[stop] = self._free()
            leg = self.comes[stop]
            batch.append(Op(False, self.source(leg), self._named(leg), self.nbytes(leg)))
        for leg in legs:
            self.sending[self.loaded.pop(leg.start)] = leg
            batch.append(Op(True, self.dest(leg), self._named(leg), self.nbytes(leg)))
        self.exchange.batches.append(batch)

    def _named(self, leg: Leg) -> tuple[Any, ...]:
        return self.kind.name, leg.owner, leg.stop


class Recorder(ExchangeBase):
    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, None, None)
        self.batches: list[list[Op]] = []
        self.progress = None

    def rotation(self, kind: Kind) -> Recorded:
        self.rotations.append(Recorded(self, kind))
        return self.rotations[-1]  # type: ignore[no-any-return]

    @contextmanager
    def computing(self, hop: int = 0) -> Iterator[None]:
        yield

    def split_keys(self, *arrays: Any) -> Any:
        return [Nothing()] * (len(arrays) + 1), [Nothing()] * (len(arrays) + 1)

    def accumulators(self, *_: Any) -> tuple[Nothing, Nothing]:
        return Nothing(), Nothing()


@dataclass(frozen=True)
class Blocks(Rule):
    """Which rank's queries see which rank's keys."""

    table: tuple[tuple[bool, ...], ...]
    s_q: tuple[int, ...]
    s_kv: tuple[int, ...]

    def __call__(self, *_: Any) -> Any:
        raise AssertionError("only whole blocks are asked for")

    def sees(self, rows: slice, keys: slice) -> bool | None:
        found = {
            self.table[i][j] for i in _owners(self.s_q, rows) for j in _owners(self.s_kv, keys)
        }
        return None if len(found) > 1 else found == {True}


def _owners(lengths: tuple[int, ...], part: slice) -> list[int]:
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [
        rank for rank, (start, n) in enumerate(zip(starts, lengths, strict=True))
        if n and start < part.stop and part.start < start + n
    ]  # fmt: skip


def some_layout(rng: random.Random, schedule: str, masked: str) -> Layout:
    """Return a layout of ragged and empty shares, in any order, with one side frozen or none."""
    a, b = rng.choice(SHAPES)
    P = a * b
    s_q, s_kv = (tuple(rng.choice([0, 1, 2, 30]) for _ in range(P)) for _ in range(2))
    share = {"none": 1.0, "half": 0.5, "sparse": 0.15}.get(masked, 0.0)
    table = tuple(
        tuple(i >= j if masked == "causal" else rng.random() < share for j in range(P))
        for i in range(P)
    )
    ruled = masked != "none"
    return replace(
        planned((1, 1, P, 2), (1, 1, P, 2), P, schedule=schedule,
                grid=(a, b) if schedule == "grid" else None),
        order=tuple(rng.sample(range(P), P)), s_q=s_q, s_kv=s_kv, rules=(ruled,) * P,
        structures=(Blocks(table, s_q, s_kv),) * P if ruled else (),
        gradients=rng.choice(["qkv", "q", "kv"]),
    )  # fmt: skip


def posted(layout: Layout, backward: bool) -> list[list[list[Op]]]:
    """Return every rank's batches of one pass."""
    found = []
    for rank in range(layout.size):
        exchange = Recorder(layout.seen_by(rank))
        PASSES[layout.schedule][backward](*[Nothing()] * (6 if backward else 3), exchange)  # type: ignore[arg-type]
        for rotation in exchange.rotations:
            assert not [*rotation.due, *rotation.loaded, *rotation.receiving]
            assert len(rotation.buffers) <= 2 or layout.structures
        found.append(exchange.batches)
    return found


def stuck(todo: list[list[list[Op]]]) -> bool:
    """Complete all transfers, each rank's batches in order; return whether that is impossible."""
    todo = [[list(batch) for batch in batches if batch] for batches in todo]
    while any(todo):
        now = {(rank, *op) for rank, batches in enumerate(todo) for op in (batches or [[]])[0]}
        met = {
            (rank, sends, other, block, nbytes)
            for rank, sends, other, block, nbytes in now
            if (other, not sends, rank, block, nbytes) in now
        }
        if not met:
            return True
        for rank, batches in enumerate(todo):
            if batches:
                batches[0] = [op for op in batches[0] if (rank, *op) not in met]
                if not batches[0]:
                    del batches[0]
    return False


@pytest.mark.parametrize("masked", ["none", "half", "sparse", "causal"])
@pytest.mark.parametrize("schedule", PASSES)
def test_no_transfer_waits_for_a_later_one(
    monkeypatch: pytest.MonkeyPatch, schedule: str, masked: str
) -> None:
    modules: tuple[ModuleType, ...] = (lv_xattn, ring_attention, grid)
    for module in modules:
        for name, fake in (
            ("partial_attention", lambda *_, **__: [Nothing()] * 3),
            ("merge_partials", lambda *_: [Nothing()] * 3),
            ("block_attention_backward", lambda *_, **__: Nothing()),
            ("travelling_mask", lambda _: []),
            ("visiting_mask", lambda *_: None),
        ):
            monkeypatch.setattr(module, name, fake, raising=False)
    rng = random.Random(f"{schedule} {masked}")
    for _ in range(60):
        layout = some_layout(rng, schedule, masked)
        for backward in (False, True):
            assert not stuck(posted(layout, backward)), layout

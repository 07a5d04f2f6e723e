"""Who holds what, for tensors: the shared layout, agreed on over a process group.

It also keeps the buffers that blocks travel in, so that a layout that is used again costs neither
small collectives nor allocations.
"""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from lvxattn.common import layout as shared
from lvxattn.common.handshake import agree_on
from lvxattn.common.masks import MaskRule
from lvxattn.common.validation import check_here_or_together, is_array, library, on_rank
from lvxattn.plan import choose

from .group import AnyGroup, Group, over_cpu
from .lazy import is_dtensor

# Bytes that say which forward a block of a backward belongs to.
STAMP = 8


@dataclass(frozen=True)
class Layout(choose.Layout):
    """What all ranks agreed on, seen from one of them.

    Attributes are those of `lvxattn.reference.Layout`.  It may be used for any number of calls, one
    at a time on a device's stream, as their buffers are the same.
    """

    pool: "Pool" = field(default_factory=lambda: Pool(), compare=False, repr=False)
    forwards: "Forwards" = field(default_factory=lambda: Forwards(0), compare=False, repr=False)
    forward: int | None = field(default=None, compare=False, repr=False)

    def numbered(self) -> "Layout":
        """Return the layout for the backward of the forward that is under way."""
        return replace(self, forward=self.forwards.number())

    @staticmethod
    def agree(  # type: ignore[override]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: AnyGroup = None,
        *,
        schedule: str = "lv-xattn",
        scale: float | None = None,
        mask: Tensor | MaskRule | None = None,
        queries: str = "sharded",
        machine: Any = None,
        call: str = "forward",
    ) -> "Layout":
        """Check all ranks' arguments together and lay out the ring.

        Collective: every rank of the group calls this.  One all-gather of a few numbers, two where
        a mask is a callable; when it raises, it raises the same error on every rank and nothing
        else has been sent.

        Parameters
        ----------
        q : (B, H, s_q, D)
        k : (B, H_KV, s_kv, D)
        v : (B, H_KV, s_kv, D_V)
            This rank's shares; lengths may differ between ranks and may be 0.
        group : ProcessGroup or DeviceMesh, optional
            The world unless given.
        schedule : str
            ``"lv-xattn"``, ``"ring"``, ``"ulysses"``, ``"gather"``, or ``"auto"``: the one that
            sends the fewest bytes or, on a known machine, takes the least time.
        scale : float, optional
            ``1 / sqrt(D)`` unless given.
        mask : None, tensor or callable
            What this rank's keys look like to every query.
        queries : str
            ``"sharded"``, or ``"replicated"``: every rank holds all queries.
        machine : lvxattn.plan.Machine, optional
            Where the ranks are; rank 0's counts.
        call : str
            What the layout is for, in words; must be equal on all ranks.

        Returns
        -------
        Layout
            Valid for any call on any tensors of these shapes and this dtype.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what was expected, what was given and the rank.
        """
        comm = Group.of(group)
        records = agree_on(
            q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries, call=call,
            machine=machine, check=lambda: check_tensors(q, k, v, mask, comm),
        )  # fmt: skip
        layout, read = Layout.of(records, comm.rank), over_cpu(comm, q.device)
        stamp_nbytes = STAMP if comm.size > 1 and read else 0
        return replace(layout, stamp_nbytes=stamp_nbytes, forwards=Forwards(records[0].clock))

    def check(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: AnyGroup = None,
        *,
        scale: float | None = None,
        mask: Tensor | MaskRule | None = None,
        queries: str = "sharded",
    ) -> None:
        """Check that this rank's arguments fit what was agreed.  Not collective.

        Raises
        ------
        ValueError, TypeError
            On this rank only: the others end by the group's timeout, or by their launcher.
        """
        comm = Group.of(group)
        try:
            check_tensors(q, k, v, mask, comm)
        except (TypeError, ValueError) as error:
            raise on_rank(error, comm.rank, comm.size) from None
        super().check(q, k, v, comm, scale=scale, mask=mask, queries=queries)


class Forwards:
    """Numbers the forwards of a layout: equal on all ranks, for each of them takes part in all.

    Parameters
    ----------
    agreed : int
        When the layout was agreed on, in microseconds of rank 0's clock.
    """

    def __init__(self, agreed: int) -> None:
        self.agreed, self.count = agreed, 0

    def number(self) -> int:
        """Return the next number, which no other layout has either; it fits into 8 bytes."""
        self.count += 1
        return self.agreed << 12 | self.count % (1 << 12)

    @staticmethod
    def name(number: int) -> str:
        """Return how messages name a forward."""
        agreed = datetime.fromtimestamp((number >> 12) / 1e6, UTC)
        return f"forward {number % (1 << 12)} of the layout of {agreed:%H:%M:%S.%f} UTC"


class Pool:
    """Buffers at rest, by size and device; a pass takes what it needs and gives it back.

    Parameters
    ----------
    keeps : bool
        Whether it keeps what it is given: not where a layout serves one call, whose graph would
        hold the buffers until its backward.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self.at_rest: dict[tuple[int, torch.device, bool], list[Tensor]] = {}

    def take(self, nbytes: int, device: torch.device, *, pinned: bool) -> Tensor:
        """Return a buffer of bytes that nobody else has."""
        buffers = self.at_rest.get((nbytes, device, pinned))
        if buffers:
            return buffers.pop()
        # A buffer made in inference mode could not be written to outside of it.
        with torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        if not self.keeps:
            return
        key = buffer.numel(), buffer.device, buffer.is_pinned()
        self.at_rest.setdefault(key, []).append(buffer)


def shard(x: Tensor, group: AnyGroup = None, axis: int = 2) -> Tensor:
    """Return this rank's part of a tensor that every rank holds whole.  Not collective.

    Parameters
    ----------
    x : Tensor
    group : ProcessGroup or DeviceMesh, optional
        The world unless given.
    axis : int
        The axis that is cut; the first ``length % P`` parts are one longer than the others.

    Returns
    -------
    Tensor
        A view of x.
    """
    return shared.shard(x, Group.of(group), axis)


def unshard(x: Tensor, group: AnyGroup = None, axis: int = 2) -> Tensor:
    """Join all ranks' parts, of any lengths, into the whole, which every rank must have room for.

    Collective: every rank of the group calls this.  For looking at results: it carries no
    gradients, and goes through the host's memory.

    Parameters
    ----------
    x : Tensor
    group : ProcessGroup or DeviceMesh, optional
        The world unless given.
    axis : int
        The axis along which the parts follow one another in rank order.

    Returns
    -------
    Tensor
        On x's device.

    Raises
    ------
    ValueError, TypeError
        On every rank, when the parts differ in dtype or in another axis, or are no tensors.
    """
    comm, part = Group.of(group), x.detach().cpu() if isinstance(x, Tensor) else x
    whole: Tensor = shared.unshard(part, comm, axis)
    check_here_or_together(lambda: check_kind("x", x), comm, together=False)
    return whole.to(x.device)


def check_tensors(q: Any, k: Any, v: Any, mask: Any, group: Group) -> None:
    """Check what only tensors can get wrong; what is no array is left to the shared checks.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what was given.
    """
    check_kind("q", q)
    arrays = {"q": q, "k": k, "v": v}
    if mask is not None and not callable(mask):
        arrays["mask"] = mask
    for name, x in arrays.items():
        check_tensor(name, x, q)
    if isinstance(q, Tensor):
        over_cpu(group, q.device)
    if getattr(mask, "requires_grad", False):
        raise ValueError("mask: expected a constant, got a tensor that requires a gradient")


def check_kind(name: str, x: Any) -> None:
    """Refuse the arrays of other libraries; what is no array is left to the shared checks."""
    if is_array(x) and not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {type(x).__name__} of {library(x)}")


def check_tensor(name: str, x: Any, q: Any, of: str = "q") -> None:
    """Check that `x`, if a tensor, is a plain one on the device of `q`, which is argument `of`."""
    if not isinstance(x, Tensor):
        return
    if is_dtensor(x):
        raise TypeError(
            f"{name}: expected this rank's part as a plain tensor, got a DTensor; "
            f"{name}.to_local() gives it"
        )
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
        raise TypeError(f"{name}: expected a strided tensor, got {kind}")
    if isinstance(q, Tensor) and x.device != q.device:
        raise ValueError(f"{name}: expected {of}'s device {q.device}, got {x.device}")

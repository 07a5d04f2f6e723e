"""The layout for tensors: which rank holds what, agreed on over a process group.

It also keeps the buffers of messages, so that a call with a layout needs no small collectives, and
allocates none.
"""

import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from lvxattn.common import layout as shared
from lvxattn.common.handshake import agree_on
from lvxattn.common.masks import MaskRule
from lvxattn.common.pool import Pool
from lvxattn.common.rules import Rule
from lvxattn.common.validation import check_here_or_together, is_array, library, on_rank
from lvxattn.plan import choose

from .group import AnyGroup, Group, backends_of, over_cpu

# Bytes that identify the forward that a block of a backward belongs to.
STAMP = 8
# Not the digest of any layout.
DIFFERENT = 2**32
# What the record of a layout lacks: what it keeps, the machine for which it was chosen, and rules,
# which are callable masks.
UNRECORDED = ("machine", "pool", "forwards", "record", "structures")


@dataclass(frozen=True)
class Layout(choose.Layout):
    """The distribution of queries and keys that all ranks agreed on, as one of them sees it.

    Attributes are those of `lvxattn.reference.Layout`.  A layout may be used for any number of
    calls, but only one at a time on a device's stream, as calls share its buffers.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import Layout, cross_attention
    >>> q, k, v = (torch.ones(1, 2, s, 8) for s in (6, 50, 50))  # this rank's
    >>> layout = Layout.agree(q, k, v)
    >>> layout.S_Q, layout.S_KV, layout.schedule
    (6, 50, 'lv-xattn')
    >>> out = cross_attention(q, k, v, layout=layout)
    """

    forwards: "Forwards" = field(default_factory=lambda: Forwards(0), compare=False, repr=False)
    forward: int | None = field(default=None, compare=False, repr=False)
    record: Tensor | None = field(default=None, compare=False, repr=False)

    def numbered(self, number: int | None = None) -> "Layout":
        """Return the layout for the backward of the current forward, or of the one of a number."""
        return replace(self, forward=int(self.forwards.advance()) if number is None else number)

    def with_queries(
        self, s_q: int | Sequence[int], group: AnyGroup = None, *, rule: Rule | None = None
    ) -> "Layout":
        """Return the layout for other numbers of queries, and the same keys, as text grows.

        Collective: every rank of the group calls this, with the same arguments.  Parameters and
        errors are those of `lvxattn.reference.Layout.with_queries`.

        Examples
        --------
        >>> import torch
        >>> from lvxattn.torch_impl import Layout, cross_attention
        >>> q, k, v = (torch.ones(1, 2, s, 8) for s in (6, 50, 50))
        >>> prompt = Layout.agree(q, k, v, queries="replicated")
        >>> token = prompt.with_queries(1)
        >>> cross_attention(q[:, :, :1], k, v, queries="replicated", layout=token).shape
        torch.Size([1, 2, 1, 8])
        """
        found = super().with_queries(s_q, Group.of(group), rule=rule)
        return replace(found, record=None if self.record is None else found.to_record())

    def _compared(self, found: "Layout | Exception", comm: Any) -> "Layout":
        # To gather objects takes two collectives, as long as to agree anew: that is done only where
        # ranks differ, or have an error, or where a tensor on the CPU cannot be reduced.
        config = "" if comm.size == 1 else str(dist.get_backend_config(comm.group))
        if "cpu" in backends_of(config):
            digest = DIFFERENT
            if not isinstance(found, Exception):
                digest = crc32(pickle.dumps((found.s_q, found.structures)))
            largest = torch.tensor([digest, -digest], device="cpu")
            with comm.waiting(lambda: "all ranks to compare layouts"):
                dist.all_reduce(largest, dist.ReduceOp.MAX, comm.group)
            if largest[0] != DIFFERENT and not largest.sum():
                assert not isinstance(found, Exception)
                return found
        return super()._compared(found, comm)

    def to_record(self) -> Tensor:
        """Return the layout as text in a tensor of `record_nbytes`, for compiled programs."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in UNRECORDED}
        values["hosts"] = [host[:64] for host in self.hosts]
        text = json.dumps(values).encode().ljust(record_nbytes(self.size))
        with torch.inference_mode(mode=False):
            return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    @staticmethod
    def of_record(record: Tensor) -> "Layout":
        """Return the layout of a record; it keeps no buffers."""
        values = json.loads(record.numpy().tobytes())
        values["masks"] = [mask and (tuple(mask[0]), mask[1]) for mask in values["masks"]]
        values = {n: tuple(x) if isinstance(x, list) else x for n, x in values.items()}
        return Layout(**values, pool=Pool(keeps=False))

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
        keys: str = "sharded",
        gradients: str = "qkv",
        grid: tuple[int, int] | None = None,
        machine: Any = None,
        call: str = "forward",
    ) -> "Layout":
        """Check all ranks' arguments together, and return the layout.

        Collective: every rank of the group calls this.  It takes one all-gather of a few numbers,
        two where a mask is a callable.  An error is raised on every rank alike, before anything
        else is sent.

        Parameters
        ----------
        q, k, v, group, scale, mask, queries, keys, grid
            As in `cross_attention`.
        gradients : str
            The arguments whose gradients the backwards of all ranks compute: ``"qkv"``, ``"q"``
            where keys and values are frozen, ``"kv"`` where queries are.  Whether the tensors given
            here require gradients does not count.
        schedule : str
            As there; with `machine`, ``"auto"`` is the schedule that takes the least time.
        machine : lvxattn.plan.Machine, optional
            The machine that the ranks run on; rank 0's counts.
        call : str
            Description of the call; must be equal on all ranks.

        Returns
        -------
        Layout
            For any call on tensors of these shapes and this dtype.

        Raises
        ------
        ValueError, TypeError
            The message names the argument, what was expected, what was given and the rank.
        """
        layout = Layout.agree_once(
            q, k, v, Group.of(group), schedule=schedule, scale=scale, mask=mask, queries=queries,
            keys=keys, gradients=gradients, grid=grid, call=call, machine=machine,
        )  # fmt: skip
        return replace(layout, pool=Pool(), record=layout.to_record())

    @staticmethod
    def agree_once(
        q: Tensor, k: Tensor, v: Tensor, comm: Group, *, mask: Tensor | MaskRule | None,
        **options: Any,
    ) -> "Layout":  # fmt: skip
        """Return `agree` for one call: it keeps no buffers, and compiled programs cannot hold it.

        Collective: every rank of the group calls this.
        """
        records = agree_on(
            q, k, v, comm, mask=mask, **options,
            check=lambda: check_tensors(q, k, v, mask, comm),
        )  # fmt: skip
        layout, read = Layout.of(records, comm.rank), over_cpu(comm, q.device)
        stamp_nbytes, forwards = STAMP if comm.size > 1 and read else 0, Forwards(records[0].clock)
        return replace(layout, stamp_nbytes=stamp_nbytes, forwards=forwards, pool=Pool(keeps=False))

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
        keys: str = "sharded",
    ) -> None:
        """Check that this rank's arguments fit the layout.  Not collective.

        Raises
        ------
        ValueError, TypeError
            On this rank only; the others are ended by the group's timeout, or by their launcher.
        """
        comm = Group.of(group)
        try:
            check_tensors(q, k, v, mask, comm)
        except (TypeError, ValueError) as error:
            raise on_rank(error, comm.rank, comm.size) from None
        super().check(q, k, v, comm, scale=scale, mask=mask, queries=queries, keys=keys)


class Forwards:
    """Numbers the forwards of a layout, equally on all ranks, as all take part in each forward.

    Parameters
    ----------
    agreed : int
        The time of agreement, in microseconds of rank 0's clock.
    """

    def __init__(self, agreed: int) -> None:
        # A tensor, as only that may change in a compiled program from one call to the next.
        with torch.inference_mode(mode=False):
            self.last = torch.tensor(agreed << 12, dtype=torch.int64, device="cpu")

    def advance(self) -> Tensor:
        """Return the next number, unique among all layouts, as a tensor."""
        return self.last.add_(1).clone()

    @staticmethod
    def name(number: int) -> str:
        """Return the name of a forward in messages."""
        agreed = datetime.fromtimestamp((number >> 12) / 1e6, UTC)
        return f"forward {number % (1 << 12)} of the layout of {agreed:%H:%M:%S.%f} UTC"


def record_nbytes(ranks: int) -> int:
    """Return the number of bytes of a layout's record, more than any layout of these ranks takes.

    It depends on nothing else, as a compiled program must know it.
    """
    return 1024 + 256 * ranks


def shard(x: Tensor, group: AnyGroup = None, axis: int = 2) -> Tensor:
    """Return this rank's part of a tensor that every rank has.  Not collective.

    Parameters
    ----------
    x : Tensor
    group : ProcessGroup or DeviceMesh, optional
        Default: the world.
    axis : int
        The axis that is split; the first ``length % P`` parts are one longer than the others.

    Returns
    -------
    Tensor
        A view of x.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import shard
    >>> shard(torch.ones(1, 2, 10, 8)).shape  # of one process
    torch.Size([1, 2, 10, 8])
    """
    return shared.shard(x, Group.of(group), axis)


def unshard(x: Tensor, group: AnyGroup = None, axis: int = 2) -> Tensor:
    """Return all ranks' parts, of any lengths, concatenated in rank order, on every rank.

    Collective: every rank of the group calls this.  For inspecting results: without gradients, and
    through host memory.

    Parameters
    ----------
    x : Tensor
    group : ProcessGroup or DeviceMesh, optional
        Default: the world.
    axis : int
        The axis of concatenation.

    Returns
    -------
    Tensor
        On x's device.

    Raises
    ------
    ValueError, TypeError
        On every rank, where parts differ in dtype or in another axis, or are not tensors.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import shard, unshard
    >>> x = torch.arange(10.0).reshape(1, 1, 10, 1)
    >>> torch.equal(unshard(shard(x)), x)
    True
    """
    comm, part = Group.of(group), x.detach().cpu() if isinstance(x, Tensor) else x
    whole: Tensor = shared.unshard(part, comm, axis)
    check_here_or_together(lambda: check_kind("x", x), comm, together=False)
    return whole.to(x.device)


def check_tensors(q: Any, k: Any, v: Any, mask: Any, group: Group) -> None:
    """Check the properties that only tensors have; `lvxattn.common.validation` checks the rest.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was expected and what was given.
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
    """Check that `x`, if an array, is a tensor."""
    if is_array(x) and not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {type(x).__name__} of {library(x)}")


def check_tensor(name: str, x: Any, q: Any, of: str = "q") -> None:
    """Check that `x`, if a tensor, is a plain one on the device of `q`, the argument named `of`."""
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


def is_dtensor(x: Any) -> bool:
    """Return whether x is a DTensor, without importing that class, which takes seconds."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)

"""The distribution of queries and keys over ranks, and the order of the ring.

Each rank holds a contiguous share of the queries and of the keys and values; concatenated in rank
order the shares are the whole.  The ring visits the ranks host by host, regardless of their
numbers, so that its P - 1 hops cross slow links between hosts as rarely as possible:

    ranks 0 2 on host a, 1 3 on host b        0 -> 2 => 1 -> 3 => 0        (=> crosses hosts)

A grid has several rings (`rings.py`), laid out in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from math import isclose
from typing import Any, Self

from lvxattn.common.growing import compared, for_queries
from lvxattn.common.handshake import (
    EQUAL_ON_ALL_RANKS,
    MASKS_TRAVEL,
    ONLY_OF_THE_CALL,
    Backward,
    MaskKind,
    Record,
    agree_on,
    mask_kind,
)
from lvxattn.common.masks import MaskView
from lvxattn.common.pool import Pool
from lvxattn.common.rings import rings, side_inside, stops
from lvxattn.common.rules import Rule, same_rule
from lvxattn.common.validation import (
    Communicator,
    accumulator,
    check_attention,
    check_backward,
    check_communicator,
    check_mask_rows,
    dtype_name,
    is_array,
    library,
    on_rank,
)

Array = Any


@dataclass(frozen=True)
class Layout:
    """The layout of a problem over ranks, as one of them sees it.

    Attributes
    ----------
    rank : int
    order : tuple of int
        A permutation of the ranks, those of one host side by side: the ring, or a grid's ranks,
        column by column or row by row.
    s_q, s_kv : tuple of int
        Numbers of queries, and of keys, by rank.
    masks : tuple
        By rank, shape and dtype of an array mask as it is sent, or None.
    rules : tuple of bool
        By rank, whether the mask is a callable.
    structures : tuple
        By rank, the mask if it is a `Rule`, else None; empty where no rank has one.
    B, H, H_KV, D, D_V : int
        Sizes, equal on all ranks.
    dtype : str
        Of q, k and v.
    scale : float
    schedule : str
    queries : str
        ``"sharded"``, or ``"replicated"``: every rank holds all queries.
    keys : str
        ``"sharded"``, or ``"replicated"``: every rank holds all keys and values.
    gradients : str
        The arguments whose gradients a backward computes, if only on one rank: ``"qkv"``, ``"q"``
        or ``"kv"``.
    grid : (int, int) or None
        With ``"grid"``, the numbers of ranks that queries, and that keys, move among.
    machine : lvxattn.plan.Machine or None
        The machine for which a schedule was chosen.
    stamp_nbytes : int
        Bytes by which every message of a backward is longer, for a stamp that identifies it.
    hosts : tuple of str
        By rank, the name of its host; empty if it was not agreed on by ranks.
    pool : Pool
        Buffers for messages, kept from call to call.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import Layout, run_ranks
    >>> def agree(comm):
    ...     q, kv = np.ones((1, 4, 3 + comm.rank, 8)), np.ones((1, 2, 100, 8))
    ...     return Layout.agree(q, kv, kv, comm)
    >>> layouts = run_ranks(3, agree)
    >>> layouts[0].s_q, layouts[0].S_KV
    ((3, 4, 5), 300)
    >>> layouts[1].left, layouts[1].right
    (0, 2)
    """

    rank: int
    order: tuple[int, ...]
    s_q: tuple[int, ...]
    s_kv: tuple[int, ...]
    masks: tuple[MaskKind, ...]
    rules: tuple[bool, ...]
    B: int
    H: int
    H_KV: int
    D: int
    D_V: int
    dtype: str
    scale: float
    schedule: str
    queries: str = "sharded"
    machine: Any = None
    stamp_nbytes: int = 0
    hosts: tuple[str, ...] = field(default=(), compare=False)
    structures: tuple[Rule | None, ...] = ()
    keys: str = "sharded"
    gradients: str = "qkv"
    grid: tuple[int, int] | None = None
    pool: Pool = field(default_factory=Pool, compare=False, repr=False)

    @classmethod
    def agree(
        cls,
        q: Array,
        k: Array,
        v: Array,
        comm: Communicator,
        *,
        schedule: str = "lv-xattn",
        scale: float | None = None,
        mask: Any = None,
        queries: str = "sharded",
        keys: str = "sharded",
        gradients: str = "qkv",
        grid: tuple[int, int] | None = None,
        machine: Any = None,
        backward: Backward | None = None,
        check: Callable[[], object] | None = None,
    ) -> Self:
        """Check the arguments of all ranks together, and return their layout.

        Collective: every rank of comm calls this.  One all-gather of a few numbers, two where a
        mask is a callable; an error is raised on every rank alike, and nothing else has been sent.

        Parameters
        ----------
        q : (B, H, s_q, D)
        k : (B, H_KV, s_kv, D)
        v : (B, H_KV, s_kv, D_V)
            This rank's shares; lengths may differ between ranks and may be 0.
        comm : communicator
        schedule : str
            ``"lv-xattn"``, ``"ring"``, ``"grid"``, ``"ulysses"``, ``"gather"``, or ``"auto"``: the
            one that sends the fewest bytes or, on a known machine, takes the least time
            (`lvxattn.plan.choose.Layout` resolves it).
        scale : float, optional
            Default: ``1 / sqrt(D)``.
        mask : None, array or callable
            Which of this rank's keys each query may attend to.  Ranks may differ in kind, but with
            ``"ring"``, ``"grid"`` and ``"ulysses"`` a callable must be given on all ranks or none.
        queries : str
            ``"sharded"``, or ``"replicated"``: every rank holds all queries.
        keys : str
            ``"sharded"``, or ``"replicated"``: every rank holds all keys and values.
        gradients : str
            The arguments whose gradients a backward computes: ``"qkv"``, ``"q"`` (keys and values
            are frozen) or ``"kv"`` (queries are).  Those that any rank wants count.
        grid : (int, int), optional
            With ``"grid"``, the numbers of ranks that queries, and that keys, move among; their
            product is P.  Default: the one that sends the fewest bytes or, on a machine, takes the
            least time.
        machine : lvxattn.plan.Machine, optional
            The machine on which ``"auto"``, and a grid, take the least time; that of rank 0 counts.
        backward : (dout, out, lse, dlse), optional
            Arguments of a backward, to be checked too.
        check : callable, optional
            Further checks of an implementation on this rank; raises TypeError or ValueError.

        Returns
        -------
        Layout
            Valid for any call on any arrays of these shapes and this dtype; for one at a time, as
            calls share its buffers.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what was expected, what was given and the rank.
        MemoryError
            A host has too little memory for its ranks' results and blocks, with both numbers.
        """
        call = "forward" if backward is None else "backward"
        records = agree_on(
            q, k, v, comm, schedule=schedule, scale=scale, mask=mask, queries=queries, keys=keys,
            gradients=gradients, grid=grid, machine=machine, backward=backward, call=call,
            check=check,
        )  # fmt: skip
        return cls.of(records, comm.rank)

    @classmethod
    def of(cls, records: list[Record], rank: int) -> Self:
        """Return the layout of all ranks' records, as `rank` sees it."""
        first, hosts = records[0], [r.host for r in records]
        return cls(
            rank=rank,
            order=tuple(sorted(range(len(hosts)), key=lambda r: hosts.index(hosts[r]))),
            hosts=tuple(hosts),
            s_q=tuple(r.s_q for r in records),
            s_kv=tuple(r.s_kv for r in records),
            masks=tuple(r.mask for r in records),
            rules=tuple(r.callable_mask for r in records),
            structures=tuple(r.structure for r in records)
            if any(r.structure is not None for r in records)
            else (),
            **{
                name: getattr(first, name)
                for name in EQUAL_ON_ALL_RANKS
                if name not in ONLY_OF_THE_CALL
            },
            gradients="".join(x for x in "qkv" if any(x in r.gradients for r in records)),
            machine=first.machine,
        )

    def with_queries(
        self, s_q: int | Sequence[int], comm: Communicator, *, rule: Rule | None = None
    ) -> Self:
        """Return the layout for other numbers of queries, and the same keys, as text grows.

        Collective: every rank of comm calls this, with the same arguments, which a small all-gather
        compares.  Both layouts share their buffers.

        Parameters
        ----------
        s_q : int or sequence of int
            Numbers of queries, by rank; one number where queries are replicated.
        comm : communicator
            That of the layout.
        rule : Rule, optional
            Every rank's mask from now on, if that is a `Rule`.  Default: those agreed on.

        Returns
        -------
        Layout
            Of the same schedule, also where it was chosen by ``"auto"``.

        Raises
        ------
        ValueError, TypeError
            On every rank alike; on this rank only where comm is not the layout's.

        Examples
        --------
        >>> import numpy as np
        >>> from lvxattn.reference import Layout, cross_attention, run_ranks
        >>> def decode(comm):
        ...     q, kv = np.ones((1, 4, 6, 8)), np.ones((1, 2, 100, 8))
        ...     prompt = Layout.agree(q, kv, kv, comm, queries="replicated")
        ...     token = prompt.with_queries(1, comm)
        ...     how = {"queries": "replicated", "layout": token}
        ...     return cross_attention(q[:, :, :1], kv, kv, comm, **how)[0].shape
        >>> run_ranks(2, decode)
        [(1, 4, 1, 8), (1, 4, 1, 8)]
        """
        check_communicator(comm)
        self._check_ranks(comm)
        return self._compared(for_queries(self, s_q, rule), comm)

    def _compared(self, found: Self | Exception, comm: Communicator) -> Self:
        """Return `compared`, which an implementation may do faster."""
        return compared(found, comm)

    @property
    def way(self) -> str:
        """The schedule, or ``"replicated"`` where queries are, or ``"replicated keys"``."""
        if self.keys == "replicated":
            return "replicated keys"
        return "replicated" if self.queries == "replicated" else self.schedule

    def check(
        self,
        q: Array,
        k: Array,
        v: Array,
        comm: Communicator,
        *,
        scale: float | None = None,
        mask: Any = None,
        queries: str = "sharded",
        keys: str = "sharded",
        gradients: str | None = None,
        backward: Backward | None = None,
    ) -> None:
        """Check that this rank's arguments fit what was agreed.  Not collective.

        Raises
        ------
        ValueError, TypeError
            On this rank only: under MPI the end of this program then ends the others.
        """
        check_communicator(comm)
        try:
            check_attention(q, k, v, scale=scale, mask=mask)
            check_mask_rows(mask, self.S_Q)
            if backward is not None:
                check_backward(q, v, *backward)
            self._check_ranks(comm)
            gradients = self.gradients if gradients is None else gradients
            for name, given in (("queries", queries), ("keys", keys), ("gradients", gradients)):
                if given != getattr(self, name):
                    raise ValueError(
                        f"{name}: expected the layout's {getattr(self, name)!r}, got {given!r}"
                    )
            # 1 / sqrt(D) and D**-0.5 differ in the last bit.
            if scale is not None and not isclose(scale, self.scale, rel_tol=1e-12):
                raise ValueError(f"scale: expected the layout's {self.scale}, got {scale}")
            expected = (
                ("q", q, (self.B, self.H, self.s_q[self.rank], self.D)),
                ("k", k, (self.B, self.H_KV, self.s_kv[self.rank], self.D)),
                ("v", v, (self.B, self.H_KV, self.s_kv[self.rank], self.D_V)),
            )
            for name, x, shape in expected:
                if tuple(x.shape) != shape:
                    raise ValueError(
                        f"{name}: expected the layout's shape {shape}, got {tuple(x.shape)}"
                    )
            if dtype_name(q) != self.dtype:
                raise TypeError(f"q: expected the layout's dtype {self.dtype}, got {dtype_name(q)}")
            travels = self.way in MASKS_TRAVEL
            if travels and callable(mask) != self.rules[self.rank]:
                raise ValueError(
                    "mask: expected a callable only if the layout was agreed with one, "
                    f"got {type(mask).__name__}"
                )
            agreed = self.structures[self.rank] if self.structures else None
            if not same_rule(agreed, mask if isinstance(mask, Rule) else None):
                raise ValueError(f"mask: expected the layout's {agreed}, got {mask!r:.100}")
            kind = mask_kind(mask, self.dtype)
            if travels and kind != self.masks[self.rank]:
                raise ValueError(
                    "mask: expected the layout's array mask (shape, dtype): "
                    f"{self.masks[self.rank]}, got {kind}"
                )
        except (TypeError, ValueError) as error:
            raise on_rank(error, comm.rank, comm.size) from None

    def _check_ranks(self, comm: Communicator) -> None:
        if (comm.rank, comm.size) != (self.rank, self.size):
            raise ValueError(
                "layout: expected the communicator it was agreed on, with this as rank "
                f"{self.rank} of {self.size}, got rank {comm.rank} of {comm.size}"
            )

    @property
    def size(self) -> int:
        """P, the number of ranks."""
        return len(self.order)

    @property
    def S_Q(self) -> int:
        """Number of queries of all ranks."""
        return self.s_q[0] if self.queries == "replicated" else sum(self.s_q)

    @property
    def S_KV(self) -> int:
        """Number of keys of all ranks."""
        return self.s_kv[0] if self.keys == "replicated" else sum(self.s_kv)

    @property
    def accumulator(self) -> str:
        """The dtype of sums and of partial results."""
        return accumulator(self.dtype)

    @property
    def right(self) -> int:
        """The rank that this rank sends to; in a grid, its queries."""
        return self.owner(-1)

    @property
    def left(self) -> int:
        """The rank that this rank receives from; in a grid, queries."""
        return self.owner(1)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of ranks that queries, and that keys, move among."""
        if self.way == "ring":
            return 1, self.size
        return (self.way == "grid" and self.grid) or (self.size, 1)

    def seen_by(self, rank: int) -> Self:
        """Return the same layout as another rank sees it."""
        found = replace(self, rank=rank)
        found.__dict__.update(_rings=self._rings, _stops=self._stops)  # the same on all ranks
        return found

    @property
    def inside(self) -> tuple[str, int]:
        """The side whose rings are of neighbours in the order, and the size of these rings."""
        return side_inside(self)

    @cached_property
    def _rings(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """What `ring` returns, by its arguments."""
        return rings(self)

    def ring(self, side: str, rank: int | None = None) -> tuple[int, ...]:
        """Return the ranks round which a rank's queries, or keys, move: its column, or its row."""
        return self._rings[side, self.rank if rank is None else rank]

    def owner(self, hop: int, side: str = "") -> int:
        """Return the owner of the block that is here after `hop` hops; this rank after all."""
        ring = self.ring(side or ("keys" if self.way == "ring" else "queries"))
        return ring[(ring.index(self.rank) - hop) % len(ring)]

    @cached_property
    def _stops(self) -> dict[tuple[str, int], dict[int, slice]]:
        """What `stops` has returned."""
        return {}

    def stops(self, side: str, owner: int) -> dict[int, slice]:
        """Return the hops after which an owner's block stops, and the rows needed there.

        Rows of its queries, or of its keys: all of them, on every rank of its ring, without a
        `Rule`; else from the first to the last that meets something visible.
        """
        if (side, owner) not in self._stops:
            self._stops[side, owner] = stops(self, side, owner)
        return self._stops[side, owner]

    def view(self, mask: Any, q_owner: int, kv_owner: int) -> MaskView:
        """Return the mask of `kv_owner`'s keys as it applies to `q_owner`'s queries."""
        q_start = 0 if self.queries == "replicated" else sum(self.s_q[:q_owner])
        kv_start = 0 if self.keys == "replicated" else sum(self.s_kv[:kv_owner])
        return MaskView(mask, q_start=q_start, kv_start=kv_start)

    @property
    def home_cut(self) -> int:
        """Number of this rank's keys that its own queries attend to first; the rest come last.

        Half, to hide either end of the rotation, or all on a single rank.  The same in forward and
        backward, so that both round scores in the same way: where scores are large, the terms of a
        row's gradient would not cancel otherwise.
        """
        s_kv = self.s_kv[self.rank]
        return s_kv if self.size == 1 else s_kv // 2


def shard(x: Array, comm: Communicator, axis: int = 2) -> Array:
    """Return this rank's part of an array that every rank holds whole.  Not collective.

    Parameters
    ----------
    x : array
    comm : communicator
    axis : int
        The axis to be cut; the first ``length % P`` parts are one longer than the others.

    Returns
    -------
    array
        A view of x.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import run_ranks
    >>> run_ranks(2, lambda comm: shard(np.arange(5), comm, axis=0).tolist())
    [[0, 1, 2], [3, 4]]
    """
    check_communicator(comm)
    cut = [slice(None)] * len(x.shape)
    cut[axis] = share(x.shape[axis], comm.rank, comm.size)
    return x[tuple(cut)]


def share(length: int, rank: int, size: int) -> slice:
    """Return the slice of a length that a rank holds; the first parts are the longer ones."""
    least, extra = divmod(length, size)
    start = rank * least + min(rank, extra)
    return slice(start, start + least + (rank < extra))


def unshard(x: Array, comm: Communicator, axis: int = 2) -> Array:
    """Return the whole of all ranks' parts, of any lengths, on every rank.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    x : array
    comm : communicator
    axis : int
        The axis along which the parts are concatenated in rank order.

    Returns
    -------
    array

    Raises
    ------
    ValueError, TypeError
        On every rank, if the parts differ in library, in dtype or in another axis.

    Examples
    --------
    >>> import numpy as np
    >>> from lvxattn.reference import run_ranks
    >>> run_ranks(2, lambda comm: unshard(np.full(1 + comm.rank, comm.rank), comm, axis=0))[0]
    array([0, 1, 1])
    """
    check_communicator(comm)
    parts = comm.allgather(x)
    first = parts[0]
    for rank, part in enumerate(parts):
        if not is_array(part) or library(part) != library(first):
            wanted = f"a {library(first)} array as on rank 0" if is_array(first) else "an array"
            error: Exception = TypeError(f"x: expected {wanted}, got {type(part).__name__}")
            raise on_rank(error, rank, comm.size)
        others = [n for i, n in enumerate(part.shape) if i != axis % len(first.shape)]
        expected = [n for i, n in enumerate(first.shape) if i != axis % len(first.shape)]
        if (others, dtype_name(part)) != (expected, dtype_name(first)):
            error = ValueError(
                f"x: expected rank 0's shape {tuple(first.shape)} but for axis {axis}, and dtype "
                f"{dtype_name(first)}, got {tuple(part.shape)} and {dtype_name(part)}"
            )
            raise on_rank(error, rank, comm.size)
    return import_module(library(first)).concatenate(parts, axis=axis)

"""Cross-attention as a module, as people put it into a model and train it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.validation import check_here_or_together

from .group import AnyGroup, Group, over_cpu
from .layout import Layout, check_tensor
from .lazy import local, not_compiled
from .recompute import cross_attention_layer

# Dtypes whose sums are taken in float64.
_DOUBLE = torch.float64, torch.complex128
# More sparse axes than any sparse gradient has: where ranks differ, it is dense.
_DENSE = 1 << 16


class CrossAttention(nn.Module):
    """Attend from text to visual features that are spread over ranks.

        q = x W_q     k, v = features W_k, features W_v     out = attention(q, k, v) W_o

    Argument names are those of `torch.nn.MultiheadAttention` where they mean the same.  Weights are
    equal on all ranks, and each rank's gradients of them are partial sums: `sum_gradients` adds
    them up.

    Parameters
    ----------
    embed_dim : int
        E, the width of the text features.
    num_heads : int
        H, the number of query heads.
    num_kv_heads : int, optional
        H_KV, the number of key-value heads, a divisor of `num_heads`; as many unless given.
    kv_dim : int, optional
        E_V, the width of the visual features; `embed_dim` unless given.
    head_dim : int, optional
        D, the width of a head; ``embed_dim // num_heads`` unless given.
    bias : bool
        Whether the four projections have biases.
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        The ranks that the features are spread over; the world at the time of a call unless given.
    recompute_kv : bool
        Keep x, the features, out and lse for the backward, and call the projections again for
        queries, keys and values: all layers of a model keep the same features, once.  Gradients are
        the same, whatever the projections have become, as by adapters.
    dropout : float
        Only 0: attention over shards cannot drop out as one process would.
    device, dtype
        Of the weights, as for any module.

    Raises
    ------
    ValueError
        Sizes that do not fit, or dropout.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        kv_dim: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        group: AnyGroup = None,
        recompute_kv: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        kv_dim = embed_dim if kv_dim is None else kv_dim
        sizes = {
            "embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
            "kv_dim": kv_dim, "head_dim": 1 if head_dim is None else head_dim,
        }  # fmt: skip
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a whole number from 1 up, got {size!r}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim = {embed_dim}, or a head_dim, "
                f"got {num_heads}"
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        if dropout != 0:
            raise ValueError(
                f"dropout: expected 0, got {dropout}: ranks would not drop what one process drops"
            )
        self.embed_dim, self.kv_dim = embed_dim, kv_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.group = None if group is None else Group.of(group)
        self.recompute_kv = recompute_kv

        def linear(wide: int, narrow: int) -> nn.Linear:
            return nn.Linear(wide, narrow, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * self.head_dim)
        self.k_proj = linear(kv_dim, num_kv_heads * self.head_dim)
        self.v_proj = linear(kv_dim, num_kv_heads * self.head_dim)
        self.out_proj = linear(num_heads * self.head_dim, embed_dim)

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        *,
        mask: Tensor | MaskRule | None = None,
        layout: Layout | None = None,
        schedule: str = "lv-xattn",
        queries: str = "sharded",
        meter: Meter | None = None,
    ) -> Tensor:
        """Attend from this rank's text to all ranks' features.

        Collective: every rank of the group calls this, and its backward.

        Parameters
        ----------
        x : (B, s_q, E)
            This rank's text features; all of them with ``queries="replicated"``.
        features : (B, s_kv, E_V)
            This rank's visual features.
        mask, layout, schedule, queries, meter
            As in `cross_attention`.  With ``queries="replicated"`` the gradients of q_proj and
            out_proj are whole on every rank: call `sum_gradients` for k_proj and v_proj alone.

        Returns
        -------
        Tensor : (B, s_q, E)
        """
        self._check(x, features, together=layout is None)
        options: dict[str, Any] = {
            "mask": mask, "layout": layout, "schedule": schedule, "queries": queries,
            "meter": meter,
        }  # fmt: skip
        out = cross_attention_layer(
            x, features, self._make_kv, self.group, make_q=self._make_q,
            recompute=self.recompute_kv, **options,
        )  # fmt: skip
        joined: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return joined

    @not_compiled
    def _check(self, x: Tensor, features: Tensor, *, together: bool) -> None:
        """Check what the projections are given; collective where `together`."""
        check_here_or_together(
            lambda: self._check_alone(x, features), Group.of(self.group), together=together
        )

    def _check_alone(self, x: Tensor, features: Tensor) -> None:
        for name, given, length, width in (
            ("x", x, "s_q", self.embed_dim), ("features", features, "s_kv", self.kv_dim)
        ):  # fmt: skip
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a torch tensor, got {type(given).__name__}")
            check_tensor(name, given, x, of="x")
            if given.ndim != 3 or given.shape[2] != width:
                raise ValueError(
                    f"{name}: expected shape (B, {length}, {width}), got {tuple(given.shape)}"
                )
        if features.shape[0] != x.shape[0]:
            raise ValueError(
                f"features: expected B = {x.shape[0]} as x has it, got {tuple(features.shape)}"
            )

    def _make_q(self, x: Tensor) -> Tensor:
        return self._heads(self.q_proj(x))

    def _make_kv(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.k_proj(features)), self._heads(self.v_proj(features))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, s, D)

    def extra_repr(self) -> str:
        """Say what the projections do not show."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, recompute_kv={self.recompute_kv}"
        )


@torch.no_grad()
def sum_gradients(module: nn.Module, group: AnyGroup = None) -> None:
    """Add up the gradients of a module's parameters over the ranks, in place.

    Collective: every rank of the group calls this, once a step, after the backward.  The sum is
    taken in float32, or float64 for float64 and complex128, in one all-reduce for each of the two.
    A parameter that has a gradient on any rank gets the sum on all: a sparse one, as
    ``nn.Embedding(sparse=True)`` makes it, where all gradients of it are sparse.  On the way it
    takes the room of a dense one.

    Every parameter is taken to be a partial sum on each rank, as it is when each rank's loss is its
    share of the whole: sum over its own tokens, divided by all ranks' number of tokens.  Parameters
    whose gradients are whole on every rank (those behind ``queries="replicated"``) do not belong
    here: give the module that holds the others.

    Parameters
    ----------
    module : torch.nn.Module
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        The world unless given.
    """
    comm = Group.of(group)
    if comm.size == 1:
        return
    # All of them, for ranks may differ in what they have frozen.
    parameters = list(module.parameters())
    if not parameters:
        return
    device = parameters[0].device
    wire = torch.device("cpu") if over_cpu(comm, device) else device
    held = torch.tensor([_kind(p.grad) for p in parameters], dtype=torch.int32, device=wire)
    with comm.waiting(lambda: "all ranks to say which gradients they have"):
        dist.all_reduce(held, dist.ReduceOp.MAX, comm.group)
    summed = [(p, kind) for p, kind in zip(parameters, held.tolist(), strict=True) if kind]
    for wide in (torch.float32, torch.float64):
        part = [(p, kind) for p, kind in summed if (p.dtype in _DOUBLE) == (wide in _DOUBLE)]
        if not part:
            continue
        grads = [_dense(p) for p, _ in part]
        # A DTensor, as fully_shard makes them along another dimension of a mesh, has a part here.
        parts = [local(g) for g in grads]
        numbers = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in parts]
        flat = torch.cat([g.to(wire, wide).flatten() for g in numbers])
        with comm.waiting(lambda: "all ranks' gradients of the weights"):
            dist.all_reduce(flat, dist.ReduceOp.SUM, comm.group)
        pieces = flat.split([g.numel() for g in numbers])
        for (p, kind), grad, mine, piece in zip(part, grads, parts, pieces, strict=True):
            total = torch.complex(*piece.view(-1, 2).T) if mine.is_complex() else piece
            mine.copy_(total.view_as(mine))
            p.grad = grad if kind == _DENSE else grad.to_sparse(kind)


def _kind(grad: Tensor | None) -> int:
    """Return 0 for no gradient, a sparse one's number of sparse axes, or `_DENSE`."""
    if grad is None:
        return 0
    return grad.sparse_dim() if grad.layout == torch.sparse_coo else _DENSE


def _dense(p: Tensor) -> Tensor:
    """Return a parameter's gradient, itself if it is dense."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad if p.grad.layout == torch.strided else p.grad.to_dense()

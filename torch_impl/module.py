"""Cross-attention as a module for models."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lvxattn.common.masks import MaskRule
from lvxattn.common.meter import Meter
from lvxattn.common.validation import check_here_or_together

from .autograd import not_compiled
from .cross_attention import is_compiled
from .group import AnyGroup, Group, over_cpu
from .layout import Layout, check_tensor, is_dtensor
from .recompute import cross_attention_layer

# Dtypes whose sums are taken in float64.
_DOUBLE = torch.float64, torch.complex128
# Larger than any number of sparse axes: where ranks differ, the sum is dense.
_DENSE = 1 << 16


class CrossAttention(nn.Module):
    """Cross-attention from text to visual features that are sharded over ranks.

        q = x W_q     k, v = features W_k, features W_v     out = attention(q, k, v) W_o

    Arguments are named as in `torch.nn.MultiheadAttention` where they mean the same.  Weights must
    be equal on all ranks, and each rank's gradients of them are partial sums, which `sum_gradients`
    adds up.

    Parameters
    ----------
    embed_dim : int
        E, the width of the text features.
    num_heads : int
        H, the number of query heads.
    num_kv_heads : int, optional
        H_KV, the number of key-value heads, a divisor of `num_heads`; default: `num_heads`.
    kv_dim : int, optional
        E_V, the width of the visual features; default: `embed_dim`.
    head_dim : int, optional
        D, the width of a head; default: ``embed_dim // num_heads``.
    bias : bool
        Whether the four projections have biases.
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        The ranks that the features are sharded over; default: the world at the time of a call.
    recompute_kv : bool
        Whether the backward recomputes queries, keys and values from x and the features.  Then only
        these, out and lse are saved, and the features, which all layers of a model share, only
        once.  The projections may be replaced by any modules, such as adapters.
    dropout : float
        Must be 0: dropout over shards would differ from that of one process.
    device, dtype
        Of the weights, as for any module.

    Raises
    ------
    ValueError
        Sizes do not fit, or dropout is not 0.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import CrossAttention
    >>> layer = CrossAttention(32, num_heads=4, kv_dim=24)
    >>> x, features = torch.ones(1, 6, 32), torch.ones(1, 50, 24)  # this rank's
    >>> layer(x, features).shape
    torch.Size([1, 6, 32])
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
        keys: str = "sharded",
        grid: tuple[int, int] | None = None,
        meter: Meter | None = None,
    ) -> Tensor:
        """Compute the attention from this rank's text to all ranks' features.

        Collective: every rank of the group calls this, and its backward.

        Parameters
        ----------
        x : (B, s_q, E)
            This rank's text features; all of them with ``queries="replicated"``.
        features : (B, s_kv, E_V)
            This rank's visual features.
        mask, layout, schedule, queries, keys, grid, meter
            As in `cross_attention`.  With ``queries="replicated"`` the gradients of q_proj and
            out_proj are complete on every rank: call `sum_gradients` for k_proj and v_proj only;
            with ``keys="replicated"`` those of k_proj and v_proj are.

        Returns
        -------
        Tensor : (B, s_q, E)
        """
        if is_compiled(mask, meter):
            self._check_alone(x, features)
        else:
            self._check(x, features, together=layout is None)
        options: dict[str, Any] = {
            "mask": mask, "layout": layout, "schedule": schedule, "queries": queries, "keys": keys,
            "grid": grid, "meter": meter,
        }  # fmt: skip
        out = cross_attention_layer(
            x, features, self._make_kv, self.group, make_q=self._make_q,
            recompute=self.recompute_kv, **options,
        )  # fmt: skip
        rows = out.transpose(1, 2).flatten(2)  # (B, s_q, H D)
        return cast(Tensor, self.out_proj(rows))  # (B, s_q, E)

    @not_compiled
    def _check(self, x: Tensor, features: Tensor, *, together: bool) -> None:
        """Check the arguments of the projections; collective where `together`."""
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
        """Return the attributes that the projections do not show."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, recompute_kv={self.recompute_kv}"
        )


@torch.no_grad()
def sum_gradients(module: nn.Module, group: AnyGroup = None) -> None:
    """Sum the gradients of a module's parameters over the ranks, in place.

    Collective: every rank of the group calls this, once per step, after the backward.  The sum is
    taken in float32, or float64 for float64 and complex128, by one all-reduce for each of the two.
    A parameter that has a gradient on any rank gets the sum on all.  The sum is sparse, as of
    ``nn.Embedding(sparse=True)``, where all gradients are; it takes the memory of a dense one while
    it is computed.

    Each rank's gradients must be partial sums, as they are where its loss is the sum over its own
    tokens divided by the number of tokens of all ranks.  Parameters whose gradients are complete on
    every rank (behind ``queries="replicated"`` those of q_proj and out_proj, behind
    ``keys="replicated"`` those of k_proj and v_proj) must not be in the module.

    Parameters
    ----------
    module : torch.nn.Module
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        Default: the world.

    Examples
    --------
    >>> import torch
    >>> from lvxattn.torch_impl import CrossAttention, sum_gradients
    >>> layer = CrossAttention(32, num_heads=4)
    >>> layer(torch.ones(1, 6, 32), torch.ones(1, 50, 32)).sum().backward()
    >>> sum_gradients(layer)  # with several ranks after every backward
    """
    comm = Group.of(group)
    if comm.size == 1:
        return
    # All parameters: ranks may differ in which ones are frozen.
    parameters = list(module.parameters())
    if not parameters:
        return
    device = parameters[0].device
    wire = torch.device("cpu") if over_cpu(comm, device) else device
    held = torch.tensor([_kind(p.grad) for p in parameters], dtype=torch.int32, device=wire)
    with comm.waiting(lambda: "all ranks to report which gradients they have"):
        dist.all_reduce(held, dist.ReduceOp.MAX, comm.group)
    summed = [(p, kind) for p, kind in zip(parameters, held.tolist(), strict=True) if kind]
    for wide in (torch.float32, torch.float64):
        part = [(p, kind) for p, kind in summed if (p.dtype in _DOUBLE) == (wide in _DOUBLE)]
        if not part:
            continue
        grads = [_dense(p) for p, _ in part]
        # The local part of DTensors, which fully_shard makes along another dimension of a mesh.
        parts = [cast(Any, g).to_local() if is_dtensor(g) else g for g in grads]
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
    """Return a parameter's gradient as a dense tensor; the gradient itself if it is dense."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad if p.grad.layout == torch.strided else p.grad.to_dense()

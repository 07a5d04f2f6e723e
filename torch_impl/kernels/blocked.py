r"""Matrix products tile by tile: every device, dtype, mask and D_V.

The numbered steps are those of mpi_impl's `block_attention` and `tiles`, on tensors.

Scores, and dout v^T, from which delta is subtracted, are computed to the accumulator's precision.
With w the unit roundoff, a score rounded to 16 bits would be off by w |score|, and its probability
by a factor of exp(w |score|), which nothing later can correct.  Probabilities and gradients of
scores are factors of products, and may be rounded to bf16: that is a relative error of w in each
term of a sum, no more than from rounding v.  fp16 lacks their range (a uniform probability over 64k
keys is subnormal), so there they stay in fp32.

Which products are computed in 16 bits is thus a matter of speed only:

    bf16, CPU with instructions for it   p v, p^T dout, ds k, ds^T q   (4 times as fast as fp32)
    fp16 on a CPU, or one without them   none: 16-bit products are emulated there
    bf16, CUDA                           all, with sums and results in fp32
    fp16, CUDA                           q k^T and dout v^T, likewise
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from lvxattn.common.masks import MaskView, tiles
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec, Sums, accumulator_of
from lvxattn.torch_impl.merge import merge_partials

NAME = "blocked"


def unsupported(spec: KernelSpec) -> str | None:  # noqa: ARG001
    """Return None: every block is supported."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: MaskView
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `partial_attention`."""
    work = Tiles(q, k, mask)
    out, top, total = work.new_rows(v.shape[3]), work.new_rows(), work.new_rows()
    for at in work.row_tiles():
        q_tile = work.load_queries(q, at, scale)
        out_tile = torch.zeros((*q_tile.shape[:2], v.shape[3]), dtype=work.dtype, device=q.device)
        top_tile = torch.full(q_tile.shape[:2], -torch.inf, dtype=work.dtype, device=q.device)
        total_tile = torch.zeros_like(top_tile)
        for keys, mask_tile in work.key_tiles(at):
            # 1. Compute scores, with -inf where a query may not attend.
            p = work.scores(q_tile, k, at, keys, scale, mask_tile)
            # 2. Softmax over this tile alone.  Where a row sees no key, 0 avoids -inf - -inf.
            row_max = p.amax(dim=-1)
            base = torch.where(row_max == -torch.inf, 0.0, row_max)
            p -= base[..., None]
            p.exp_()
            row_sum = p.sum(dim=-1)
            row_out = work.weighted(p, v[at[0], at[1], keys])
            row_out /= torch.where(row_sum == 0, 1.0, row_sum)[..., None]
            # 3. Join it with the tiles before.
            out_tile, top_tile, total_tile = merge_partials(
                out_tile, top_tile, total_tile, row_out, row_max, row_sum
            )
        for x, tile in ((out, out_tile), (top, top_tile), (total, total_tile)):
            work.store(x, at, tile)
    return out, top, total


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    sums: Sums = None,
    *,
    scale: float,
    mask: MaskView,
    wanted: str = "qkv",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `block_attention_backward`."""
    work = Tiles(q, k, mask)
    dq = work.new_rows(q.shape[3])
    kept = (k, v) if "k" in wanted else (k[:, :, :0], v[:, :, :0])
    dk, dv = sums or [torch.zeros(x.shape, dtype=work.dtype, device=q.device) for x in kept]
    for at in work.row_tiles():
        q_tile, dout_tile = work.load_queries(q, at, scale), work.load(dout, at, work.narrow)
        q_bare = work.load(q, at, work.factor)  # q times scale would be rounded once more
        lse_tile, delta_tile = work.load(lse, at), work.load(delta, at)
        dq_tile = torch.zeros((*q_tile.shape[:2], q.shape[3]), dtype=work.dtype, device=q.device)
        base = torch.where(lse_tile == -torch.inf, 0.0, lse_tile)
        for keys, mask_tile in work.key_tiles(at):
            k_tile, v_tile = k[at[0], at[1], keys], v[at[0], at[1], keys]
            # 1. Compute the probabilities of these keys among all keys.
            p = work.scores(q_tile, k, at, keys, scale, mask_tile)
            p -= base[..., None]
            p.exp_()
            # 2. Compute their gradients, and those of the scores.
            ds = work.product(1, dout_tile, v_tile)  # without scale, which dk and dq get
            ds -= delta_tile[..., None]
            ds *= p
            # 3. Add to plain sums; the heads of a group share their key-value head.
            if "k" in wanted:
                dv[at[0], at[1], keys] += work.weighted(p.transpose(-1, -2), dout_tile)
                dk[at[0], at[1], keys] += work.weighted(ds.transpose(-1, -2), q_bare) * scale
            if "q" in wanted:
                dq_tile += work.weighted(ds, k_tile)
        work.store(dq, at, dq_tile * scale)
    return dq, dk, dv


# Batch entry, key-value heads and query rows of one tile.
At = tuple[int, slice, slice]


class Tiles:
    """The tiles of one block: their sizes, and how tensors are loaded from and stored into it.

    The rows of the query heads that share a key-value head are stacked, so that a tile is one
    matrix product for each key-value head: (heads, G rows, D) by (heads, keys, D), G = H / H_KV.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: MaskView) -> None:
        self.mask, self.device, self.dtype = mask, q.device, accumulator_of(q)
        self.B, self.H, self.s_q, _ = q.shape
        self.H_KV, self.s_kv = k.shape[1:3]
        self.G = self.H // self.H_KV
        # Dtypes of the factors of q k^T and dout v^T, and of those of products with p or ds.
        self.narrow = self.factor = self.dtype
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            self.narrow = q.dtype
        if q.dtype == torch.bfloat16 and (q.is_cuda or _cpu_multiplies_bf16()):
            self.factor = q.dtype
        # CPU: the scores of a tile fit a core's cache.  Others: enough work to fill a device.
        lines, scores = (512, 2**19) if q.device.type == "cpu" else (2048 * self.H_KV, 2**26)
        self.tile_rows = max(1, min(self.s_q, lines // self.G))
        self.tile_heads = max(1, min(self.H_KV, lines // (self.G * self.tile_rows)))
        lines = self.tile_heads * self.G * self.tile_rows
        wide = self.narrow == self.dtype
        # Keys of another dtype are copied: the copies fit, too, where there are fewer scores.
        copied = self.tile_heads * k.shape[3] if k.dtype != self.narrow else 0
        self.tile_keys = max(1, min(self.s_kv, max(1024, scores // max(lines, copied))))
        size = lines * self.tile_keys if wide else 0
        self.scratch = torch.empty((2, size), dtype=self.dtype, device=q.device)

    def row_tiles(self) -> Iterator[At]:
        """Yield the batch entry, key-value heads and rows of every tile."""
        for b in range(self.B):
            for heads in tiles(self.H_KV, self.tile_heads):
                for rows in tiles(self.s_q, self.tile_rows):
                    yield b, heads, rows

    def key_tiles(self, at: At) -> Iterator[tuple[slice, Tensor | None]]:
        """Yield the keys of every tile, and its mask; on a CPU no tiles that a bool mask hides.

        On a device the program would have to wait for the answer.
        """
        b, heads, rows = at
        for keys in tiles(self.s_kv, self.tile_keys):
            mask_tile = self.mask.tile(
                slice(b, b + 1), self._query_heads(heads), rows, keys, self._arange
            )
            if (
                mask_tile is None
                or mask_tile.dtype != torch.bool
                or self.device.type != "cpu"
                or mask_tile.any()
            ):
                yield keys, mask_tile

    def new_rows(self, *width: int) -> Tensor:
        """Return a tensor (B, H, s_q, *width) in the accumulator dtype, to be stored into."""
        return torch.empty(
            (self.B, self.H, self.s_q, *width), dtype=self.dtype, device=self.device
        )  # fmt: skip

    def load(self, x: Tensor, at: At, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tile (heads, G rows, ...) of x (B, H, s_q, ...), in the accumulator dtype."""
        b, heads, rows = at
        tile = x[b, self._query_heads(heads), rows].to(dtype or self.dtype)
        return tile.reshape(heads.stop - heads.start, -1, *x.shape[3:])  # (heads, G rows, ...)

    def load_queries(self, q: Tensor, at: At, scale: float) -> Tensor:
        """Return q's tile, times scale where that rounds no more than the product would."""
        tile = self.load(q, at, self.narrow)
        return tile * scale if self.narrow == self.dtype else tile

    def store(self, x: Tensor, at: At, tile: Tensor) -> None:
        """Write a tile to where `load` reads it."""
        b, heads, rows = at
        view = x[b, self._query_heads(heads), rows]
        view.copy_(tile.view(view.shape))  # (G heads, rows, ...)

    def product(self, which: int, a: Tensor, b: Tensor) -> Tensor:
        """Return a b^T in the accumulator dtype, maybe in scratch number `which`, for a while."""
        b = b.to(self.narrow).transpose(-1, -2)  # (heads, D, keys)
        if self.narrow != self.dtype:
            return torch.bmm(a, b, out_dtype=self.dtype)
        shape = (*a.shape[:2], b.shape[2])
        out = self.scratch[which, : prod(shape)].view(shape)  # (heads, G rows, keys)
        return torch.bmm(a, b, out=out)

    def weighted(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a b, a being p or ds or their transpose, in the accumulator dtype."""
        a, b = a.to(self.factor), b.to(self.factor)
        if self.factor != self.dtype and a.is_cuda:
            return torch.bmm(a, b, out_dtype=self.dtype)
        return torch.bmm(a, b).to(self.dtype)

    def scores(
        self, q_tile: Tensor, k: Tensor, at: At, keys: slice, scale: float,
        mask_tile: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return masked scores (heads, G rows, keys), in scratch number 0."""
        b, heads, rows = at
        scores = self.product(0, q_tile, k[b, heads, keys])
        if self.narrow != self.dtype:
            scores *= scale
        if mask_tile is not None:
            by_head = scores.view(-1, rows.stop - rows.start, scores.shape[2])
            # (G heads, rows, keys)
            if mask_tile.dtype == torch.bool:
                by_head.masked_fill_(~mask_tile[0], -torch.inf)
            else:
                by_head += mask_tile[0].to(self.dtype)
        return scores

    def _arange(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.device)

    def _query_heads(self, heads: slice) -> slice:
        return slice(heads.start * self.G, heads.stop * self.G)


def _cpu_multiplies_bf16() -> bool:
    there = torch.backends.mkldnn.is_available()
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())

"""Heads and head sizes mixed up."""

import numpy as np

from lvxattn.check.wrong.kernel_base import Array, KernelBase, Partial


class TiledHeads(KernelBase, name="heads tiled"):
    """Query head h reads key-value head h % H_KV instead of h // (H / H_KV)."""

    def _kv_head(self, H: int, H_KV: int) -> Array:
        return np.arange(H) % H_KV


class ShiftedHeads(KernelBase, name="key-value head by a shift"):
    """Query head h reads key-value head h >> n, as if groups had 2^n heads."""

    def _kv_head(self, H: int, H_KV: int) -> Array:
        shift = (H // H_KV).bit_length() - 1
        return np.asarray(np.minimum(np.arange(H) >> shift, H_KV - 1))


class LastHead(KernelBase, name="dk and dv of a group's last head"):
    """Query heads that share keys overwrite one another's dk and dv instead of adding them."""

    def _sum_heads(self, dx: Array, H_KV: int) -> Array:
        last = np.zeros((dx.shape[0], H_KV, *dx.shape[2:]), dx.dtype)
        last[:, self._kv_head(dx.shape[1], H_KV)] = dx
        return last


class LastHeadOfAll(KernelBase, name="dk and dv of the last head if H_KV is 1"):
    """With a single key-value head, dk and dv are those of the last query head alone."""

    def _sum_heads(self, dx: Array, H_KV: int) -> Array:
        return dx[:, -1:] if H_KV == 1 else super()._sum_heads(dx, H_KV)


class MeanOverHeads(KernelBase, name="dk and dv averaged over a group"):
    """Gradients of query heads that share keys are averaged instead of added."""

    def _sum_heads(self, dx: Array, H_KV: int) -> Array:
        return np.asarray(super()._sum_heads(dx, H_KV) * H_KV / dx.shape[1])


class OutLikeQ(KernelBase, name="out allocated like q"):
    """The memory for out has the shape of q, as if D_V were D."""

    compare = "message"

    def _results(self, q: Array, out: Array, lse: Array) -> Partial:
        like_q = np.zeros(q.shape, q.dtype)
        D = min(q.shape[3], out.shape[3])
        like_q[..., :D] = out[..., :D]
        return like_q, lse

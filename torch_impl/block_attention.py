"""placeholder."""

import torch

from lvxattn.reference.masks import MaskView
from lvxattn.reference.validation import arange


def _scores(q, k, scale, mask):
    mask = MaskView.of(mask)
    G = q.shape[1] // k.shape[1]
    s = torch.einsum("bhgid,bhjd->bhgij", q.unflatten(1, (k.shape[1], G)), k).flatten(1, 2) * scale
    B, H, s_q, s_kv = s.shape
    tile = mask.tile(slice(0, B), slice(0, H), slice(0, s_q), slice(0, s_kv), arange(q))
    if tile is None:
        return s
    return s.masked_fill(~tile, -torch.inf) if tile.dtype == torch.bool else s + tile.to(s.dtype)


def block_attention(q, k, v, *, scale, mask=None):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(wide) for x in (q, k, v))
    s = _scores(q, k, scale, mask)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    G = q.shape[1] // k.shape[1]
    out = torch.einsum("bhgij,bhjd->bhgid", p.unflatten(1, (k.shape[1], G)), v).flatten(1, 2)
    return out, lse


def block_attention_backward(dout, q, k, v, lse, delta, *, scale, mask=None):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dout, q, k, v = (x.to(wide) for x in (dout, q, k, v))
    s = _scores(q, k, scale, mask)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    G = q.shape[1] // k.shape[1]
    g = lambda x: x.unflatten(1, (k.shape[1], G))
    dp = torch.einsum("bhgid,bhjd->bhgij", g(dout), v).flatten(1, 2)
    ds = scale * p * (dp - delta[..., None])
    dq = torch.einsum("bhgij,bhjd->bhgid", g(ds), k).flatten(1, 2)
    dk = torch.einsum("bhgij,bhgid->bhjd", g(ds), g(q))
    dv = torch.einsum("bhgij,bhgid->bhjd", g(p), g(dout))
    return dq, dk, dv

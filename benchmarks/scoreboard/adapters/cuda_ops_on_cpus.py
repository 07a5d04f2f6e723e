"""PyTorch's attention operators for CUDA, on CPUs, for packages that call them by name.

The packages' own code is not changed: rotation, merge and backward are theirs.  What stands in for
the GPU's kernel is PyTorch's flash kernel for CPUs, or plain products where there is a bias, which
that kernel would get wrong in rows without keys.
"""

import torch

aten = torch.ops.aten
_KEPT = []  # a library's kernels are gone with it


def register():
    """Register the operators, once."""
    if _KEPT:
        return
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in (
        ("_scaled_dot_product_flash_attention", _flash),
        ("_scaled_dot_product_flash_attention_backward", _flash_backward),
        ("_scaled_dot_product_cudnn_attention", _cudnn),
        ("_scaled_dot_product_cudnn_attention_backward", _cudnn_backward),
    ):
        library.impl(name, kernel, "CPU")
    _KEPT.append(library)


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):  # noqa: ARG001
    if v.shape[3] != k.shape[3]:
        raise NotImplementedError("PyTorch's flash kernel for CPUs: one head size")
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, scale=scale
    )
    return out, lse, *_rest(q, k)


def _flash_backward(
    dout, q, k, v, out, lse, _cum_q, _cum_k, _max_q, _max_k, dropout_p, is_causal, *_, scale=None
):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, dropout_p, is_causal, scale=scale
    )


def _cudnn(q, k, v, attn_bias, *_, scale=None):
    s = _scores(q, k, attn_bias, scale)
    lse = s.logsumexp(-1, keepdim=True)
    out = torch.exp(s - lse).nan_to_num(0) @ v.to(s.dtype)
    return out.to(q.dtype), lse, *_rest(q, k)


def _cudnn_backward(
    dout, q, k, v, out, lse, _seed, _offset, attn_bias, *_, scale=None
):  # fmt: skip
    s = _scores(q, k, attn_bias, scale)
    dout, wide_q, wide_k, wide_v, out = (x.to(s.dtype) for x in (dout, q, k, v, out))
    p = torch.exp(s - lse).nan_to_num(0)
    ds = p * (dout @ wide_v.mT - (dout * out).sum(-1, keepdim=True))
    ds *= q.shape[3] ** -0.5 if scale is None else scale
    dq, dk, dv = ds @ wide_k, ds.mT @ wide_q, p.mT @ dout
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q, k, bias, scale):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = q.to(wide) @ k.to(wide).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if bias is None:
        return s
    return s.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else s + bias


def _rest(q, k):
    """Return the other results: no cumulative lengths, and a state of random numbers, unused."""
    state = torch.empty((), dtype=torch.int64)
    return None, None, q.shape[2], k.shape[2], state, state, torch.empty(0, dtype=q.dtype)

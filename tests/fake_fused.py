"""PyTorch's fused CUDA attention operators, as plain products on the CPU, with their conventions.

Each call is bound to the operator's own schema, so that a wrong name or number of arguments fails.
"""

from typing import Any

import torch
from torch import Tensor


def bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by the names of the operator's schema."""
    schema = getattr(torch.ops.aten, name).default._schema
    names = [a.name for a in schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    required = {a.name for a in schema.arguments if not a.has_default_value()}
    assert len(args) <= len(names)
    assert required <= set(given) <= set(names)
    return given


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Any:
    """Return out in q's dtype and lse in fp32, +inf where there are no keys."""
    s = _scores(q, k, bias, scale)
    lse = torch.logsumexp(s, dim=-1)
    p = torch.exp(s - lse[..., None])
    return (p @ _repeat(v, q)).to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf)


def differentiate(a: dict[str, Any], dout: Tensor, lse: Tensor, bias: Tensor | None) -> Any:
    """Return dq, dk and dv; `out` serves delta alone."""
    q, k, v, out, scale = a["query"], a["key"], a["value"], a["out"], a["scale"]
    assert dout.dtype == out.dtype == q.dtype
    assert lse.dtype == torch.float32
    delta = (dout.float() * out.float()).sum(dim=-1)
    p = torch.exp(_scores(q, k, bias, scale) - lse[..., None])
    ds = p * (dout.float() @ _repeat(v, q).transpose(-1, -2) - delta[..., None])
    dk, dv = (ds.transpose(-1, -2) @ q.float()) * scale, p.transpose(-1, -2) @ dout.float()
    G = q.shape[1] // k.shape[1]
    dq = scale * ds @ _repeat(k, q)
    dk, dv = (x.unflatten(1, (-1, G)).sum(dim=2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def flash(*args: Any, **kwargs: Any) -> Any:
    a = bind("_scaled_dot_product_flash_attention", args, kwargs)
    assert a["query"].shape[1] == a["key"].shape[1]
    out, lse = attend(a["query"], a["key"], a["value"], None, a["scale"])
    return out, lse, None, None, 0, 0, None, None, None


def flash_backward(*args: Any, **kwargs: Any) -> Any:
    a = bind("_scaled_dot_product_flash_attention_backward", args, kwargs)
    assert (a["max_q"], a["max_k"]) == (a["query"].shape[2], a["key"].shape[2])
    assert a["query"].shape[1] == a["key"].shape[1]
    assert a["dropout_p"] == 0.0
    assert not a["is_causal"]
    return differentiate(a, a["grad_out"], a["logsumexp"], None)


def cudnn(*args: Any, **kwargs: Any) -> Any:
    a = bind("_scaled_dot_product_cudnn_attention", args, kwargs)
    assert a["compute_log_sumexp"]
    _grouped_only_where_rows_differ(a)
    out, lse = attend(a["query"], a["key"], a["value"], a["attn_bias"], a["scale"])
    return out, lse[..., None], None, None, 0, 0, None, None, None


def cudnn_backward(*args: Any, **kwargs: Any) -> Any:
    a = bind("_scaled_dot_product_cudnn_attention_backward", args, kwargs)
    assert a["logsumexp"].shape == (*a["query"].shape[:3], 1)
    assert (a["max_q"], a["max_k"]) == (a["query"].shape[2], a["key"].shape[2])
    _grouped_only_where_rows_differ(a)
    return differentiate(a, a["grad_out"], a["logsumexp"][..., 0], a["attn_bias"])


def efficient(*args: Any, **kwargs: Any) -> Any:
    a = bind("_scaled_dot_product_efficient_attention", args, kwargs)
    _same_heads_and_aligned(a)
    assert a["compute_log_sumexp"]
    out, lse = attend(a["query"], a["key"], a["value"], a["attn_bias"], a["scale"])
    surplus = -lse.shape[2] % 32
    return out, torch.nn.functional.pad(lse, (0, surplus), value=torch.inf), None, None


def efficient_backward(*args: Any, **kwargs: Any) -> Any:
    a = bind("_scaled_dot_product_efficient_attention_backward", args, kwargs)
    _same_heads_and_aligned(a)
    s_q, lse = a["query"].shape[2], a["logsumexp"]
    assert lse.shape[2] == s_q + -s_q % 32
    assert (lse[:, :, s_q:] == torch.inf).all()
    assert a["grad_input_mask"] == [True, True, True, False]
    return *differentiate(a, a["grad_out_"], lse[:, :, :s_q], a["attn_bias"]), None


def _same_heads_and_aligned(a: dict[str, Any]) -> None:
    q, k, bias = a["query"], a["key"], a["attn_bias"]
    assert q.shape[1] == k.shape[1]
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2])
        assert all(stride % 16 == 0 for stride in bias.stride()[:3])


def _grouped_only_where_rows_differ(a: dict[str, Any]) -> None:
    bias = a["attn_bias"]
    if bias is None or bias.shape[1:3] == (1, 1):
        assert a["query"].shape[1] == a["key"].shape[1]


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    s = scale * q.float() @ _repeat(k, q).transpose(-1, -2)
    if bias is None:
        return s
    assert bias.dtype == q.dtype
    assert not (bias == -torch.inf).all(dim=-1).any(), "what a row without keys gives is undefined"
    return s + bias.float()


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)

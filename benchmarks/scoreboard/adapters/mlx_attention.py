"""mlx.core.fast.scaled_dot_product_attention on CPUs, with NumPy's arrays around it."""

import mlx.core as mx
import numpy as np

from benchmarks.scoreboard.adapters.limits import needs_array_mask, needs_equal_sizes

mx.set_default_device(mx.cpu)


def attention(q, k, v, *, scale, mask):
    """Attend."""
    return np.array(_function(k, v, scale, mask)(*_arrays(q, k, v)))


def backward(dout, q, k, v, _out, _lse, *, scale, mask):
    """Return the gradients that MLX computes."""
    _, found = mx.vjp(_function(k, v, scale, mask), _arrays(q, k, v), _arrays(dout))
    return tuple(np.array(x) for x in found)


def _function(k, v, scale, mask):
    needs_array_mask(mask)
    if k.dtype == np.float64:
        raise NotImplementedError("mlx.core.array makes float32 of NumPy's float64")
    needs_equal_sizes(k, v, "mlx.core.fast.scaled_dot_product_attention ('[B, N_kv, T_kv, D]')")
    given = None if mask is None else mx.array(np.ascontiguousarray(mask))
    return lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=given)


def _arrays(*arrays):
    return [mx.array(np.ascontiguousarray(x)) for x in arrays]


attention.backward = backward

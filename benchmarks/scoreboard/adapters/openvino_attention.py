"""OpenVINO's operator ScaledDotProductAttention on the CPU."""

from functools import cache

import numpy as np
import openvino as ov
from openvino import opset13

from benchmarks.scoreboard.adapters.limits import (
    needs_array_mask,
    needs_equal_heads,
)


def attention(q, k, v, *, scale, mask):
    """Attend."""
    needs_array_mask(mask)
    needs_equal_heads(q, k, "OpenVINO's ScaledDotProductAttention ('[N, ..., S, E]')")
    inputs = [q, k, v, np.array(scale, q.dtype)]
    if mask is not None:
        inputs.insert(3, mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    types = tuple((x.dtype.name, x.ndim) for x in inputs)
    return np.array(_compiled(types)([np.asarray(x, order="C") for x in inputs])[0])


@cache
def _compiled(types):
    inputs = [opset13.parameter([-1] * ndim, np.dtype(dtype)) for dtype, ndim in types]
    q, k, v, *mask, scale = inputs
    if not mask:
        mask = [opset13.constant(np.zeros((), types[0][0]))]
    out = opset13.scaled_dot_product_attention(q, k, v, *mask, scale)
    model = ov.Model([out], inputs)
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

"""ONNX's operator Attention (opset 23), run by ONNX Runtime and by ONNX's own reference."""

from functools import cache

import numpy as np
from onnx import TensorProto, helper

from benchmarks.scoreboard.adapters.limits import needs_array_mask

_TYPES = {
    "float64": TensorProto.DOUBLE,
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bool": TensorProto.BOOL,
}


def runtime(q, k, v, *, scale, mask):
    """onnxruntime.InferenceSession on the CPU."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        return _attend(_session, q, k, v, scale, mask)
    except (state.Fail, state.NotImplemented) as error:
        for limit in (
            "scale must be greater than 0",
            "inconsistent q_sequence_length",
            "implement",
        ):
            if limit in str(error):
                raise NotImplementedError(f"onnxruntime: '{limit}'") from None
        raise


def reference(q, k, v, *, scale, mask):
    """onnx.reference.ReferenceEvaluator."""
    return _attend(_evaluator, q, k, v, scale, mask)


def _attend(made, q, k, v, scale, mask):
    needs_array_mask(mask)
    inputs = {"Q": q, "K": k, "V": v}
    if mask is not None:
        inputs["attn_mask"] = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    inputs = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
    types = tuple((name, x.dtype.name) for name, x in inputs.items())
    given = float(scale) if scale != q.shape[3] ** -0.5 else None
    if given and q.dtype == np.float64 and float(np.float32(given)) != given:
        raise NotImplementedError("Attention's scale is an attribute, which ONNX stores in float32")
    return made(types, given).run(None, inputs)[0]


@cache
def _session(types, scale):
    import onnxruntime

    model = _model(types, scale).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


@cache
def _evaluator(types, scale):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(_model(types, scale))


def _model(types, scale):
    shapes = {"attn_mask": ["b", "h", "s", "t"]}
    inputs = [
        helper.make_tensor_value_info(
            name, _TYPES[dtype], shapes.get(name, [f"{name}{axis}" for axis in range(4)])
        )
        for name, dtype in types
    ]
    output = helper.make_tensor_value_info("Y", _TYPES[types[0][1]], ["B", "H", "S", "D_V"])
    node = helper.make_node(
        "Attention", [name for name, _ in types], ["Y"], **({"scale": scale} if scale else {})
    )
    graph = helper.make_graph([node], "attention", inputs, [output])
    opsets = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)

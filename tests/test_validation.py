"""What arguments are accepted, and the exact messages for those that are not."""

import threading
from datetime import timedelta
from math import inf, nan
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lvxattn import reference
from lvxattn.common.validation import (
    accumulator,
    check_attention,
    check_backward,
    check_mask_rows,
    check_seconds,
    dtype_name,
    library,
    raise_together,
)
from lvxattn.mpi_impl.transport.device import array_module
from tests import fake_cupy
from tests.errors import says

FLOATS = "float16, bfloat16, float32, float64"
Q, K, V = np.zeros((2, 4, 5, 8)), np.zeros((2, 2, 7, 8)), np.zeros((2, 2, 7, 3))


def test_seconds_fit_into_all_timers() -> None:
    for text in ("1e300", "1e10"):
        seconds = check_seconds("LVXATTN_TIMEOUT", text)
        assert seconds is not None
        assert 1e9 <= seconds <= threading.TIMEOUT_MAX
        assert timedelta(seconds=seconds)


def attention(**changed: Any) -> None:
    given = {"q": Q, "k": K, "v": V, "scale": None, "mask": None, **changed}
    check_attention(given["q"], given["k"], given["v"], scale=given["scale"], mask=given["mask"])
    check_mask_rows(given["mask"], 5)


def backward(**changed: Any) -> None:
    out, lse = np.zeros((2, 4, 5, 3)), np.zeros((2, 4, 5))
    given = {"dout": out, "out": out, "lse": lse, "dlse": lse, **changed}
    check_backward(Q, V, *given.values())


class Alone:
    """The only rank."""

    rank, size = 0, 1


# The exact text of each message, once.
MESSAGES = [
    ({"q": Q[0]}, ValueError, "q: expected 4 axes (B, H, s_q, D), got shape (4, 5, 8)"),
    (
        {"q": Q[:0]},
        ValueError,
        "q: expected every axis of (B, H, s_q, D) but the length to be at least 1, "
        "got shape (0, 4, 5, 8)",
    ),
    ({"k": K[:1]}, ValueError, "k: expected B = 2 on axis 0 as in q, got shape (1, 2, 7, 8)"),
    (
        {"q": Q[:, :3]},
        ValueError,
        "k: expected H_KV to divide q's H = 3, got H_KV = 2 in shape (2, 2, 7, 8)",
    ),
    ({"scale": inf}, ValueError, "scale: expected a finite number, got inf"),
    ({"scale": "1"}, TypeError, "scale: expected a real number or None, got str '1'"),
    (
        {"mask": np.ones((3, 1, 1, 7))},
        ValueError,
        "mask: expected a shape that broadcasts to (B, H, S_Q, s_kv) = (2, 4, S_Q, 7), "
        "got (3, 1, 1, 7)",
    ),
    (
        {"mask": np.ones((1, 1, 1, 1))},
        ValueError,
        "mask: expected its last axis to be exactly the keys, s_kv = 7, got (1, 1, 1, 1)",
    ),
    (
        {"mask": np.ones((4, 7))},
        ValueError,
        "mask: expected its query axis to be 1 or all queries, S_Q = 5, got (4, 7)",
    ),
    (
        {"mask": np.ones(7, int)},
        TypeError,
        "mask: expected bool (True = may attend) or an additive floating dtype, got int64",
    ),
    ({"q": [[0.0]]}, TypeError, "q: expected an array, got list [[0.0]]"),
    ({"q": Q.astype(int)}, TypeError, f"q: expected one of {FLOATS}, got int64"),
    ({"k": K.astype("f4")}, TypeError, "k: expected q's dtype float64, got float32"),
    (
        {"q": np.ma.masked_array(Q)},
        TypeError,
        "q: expected a plain array and mask=, got a masked array",
    ),
    ({"k": fake_cupy.asarray(K)}, TypeError, "k: expected a numpy array as q is, got fake_cupy"),
]

VALUES = [
    ({"k": K[None]}, says("k", "(B, H_KV, s_kv, D)", "(1, 2, 2, 7, 8)")),
    ({"v": V[0, 0]}, says("v", "(B, H_KV, s_kv, D_V)", "(7, 3)")),
    ({"k": K[:, :0]}, says("k", "(2, 0, 7, 8)")),
    ({"v": V[..., :0]}, says("v", "(2, 2, 7, 0)")),
    ({"k": K[..., :4]}, says("k", "D", 8, "(2, 2, 7, 4)")),
    ({"v": V[:1]}, says("v", "B", 2, "(1, 2, 7, 3)")),
    ({"v": V[:, :1]}, says("v", "H_KV", 2, "(2, 1, 7, 3)")),
    ({"v": V[:, :, :6]}, says("v", "s_kv", 7, "(2, 2, 6, 3)")),
    ({"scale": nan}, says("scale", "nan")),
    ({"scale": 10**400}, says("scale", 10**39)),
    ({"mask": np.ones((1, 1, 1, 1, 7))}, says("mask", "(2, 4, S_Q, 7)", "(1, 1, 1, 1, 7)")),
    ({"mask": np.ones(())}, says("mask", "(2, 4, S_Q, 7)", "()")),
    ({"mask": np.ones((2, 1, 7))}, says("mask", "(2, 4, S_Q, 7)", "(2, 1, 7)")),
]

KINDS = [
    ({"k": None}, says("k", "None")),
    ({"v": "x" * 60}, says("v", "'" + "x" * 39)),
    ({"k": K > 0}, says("k", FLOATS, "bool")),
    ({"v": V + 0j}, says("v", FLOATS, "complex128")),
    ({"q": Q.astype(np.longdouble)}, says("q", FLOATS, np.longdouble(0).dtype)),
    ({"v": V.astype("f2")}, says("v", "float64", "float16")),
    ({"q": fake_cupy.asarray(Q)}, says("k", "fake_cupy", "numpy")),
    ({"mask": fake_cupy.asarray(V)}, says("mask", "numpy", "fake_cupy")),
    ({"scale": True}, says("scale", True)),
    ({"scale": 1j}, says("scale", "1j")),
    ({"mask": [True] * 2}, says("mask", "[True, True]")),
]

BACKWARD = [
    (
        {"dout": Q},
        ValueError,
        r"^dout: expected shape \(B, H, s_q, D_V\) = \(2, 4, 5, 3\), got \(2, 4, 5, 8\)$",
    ),
    ({"dout": None}, TypeError, says("dout", "None")),
    ({"lse": np.zeros((2, 4, 5), int)}, TypeError, says("lse", FLOATS, "int64")),
    ({"dlse": fake_cupy.asarray(Q)}, TypeError, says("dlse", "numpy", "fake_cupy")),
    ({"out": V}, ValueError, says("out", "(2, 4, 5, 3)", "(2, 2, 7, 3)")),
    ({"lse": np.zeros((2, 4, 5, 1))}, ValueError, says("lse", "(2, 4, 5)", "(2, 4, 5, 1)")),
    ({"dlse": np.zeros((2, 4))}, ValueError, says("dlse", "(2, 4, 5)", "(2, 4)")),
]


def arguments(rows: list[Any]) -> list[str]:
    """Return a name for each row of a table: the argument that it changes."""
    return [next(iter(changed)) for changed, *_ in rows]


@pytest.mark.parametrize(("changed", "kind", "text"), MESSAGES, ids=arguments(MESSAGES))
def test_error_messages(changed: dict[str, Any], kind: type[Exception], text: str) -> None:
    attention()
    with pytest.raises(kind) as raised:
        attention(**changed)
    assert (raised.type, str(raised.value)) == (kind, text)


ERRORS = [
    *((changed, ValueError, text) for changed, text in VALUES),
    *((changed, TypeError, text) for changed, text in KINDS),
]


@pytest.mark.parametrize(("changed", "kind", "text"), ERRORS, ids=arguments(ERRORS))
def test_bad_arguments_raise(changed: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        attention(**changed)


@pytest.mark.parametrize(("changed", "kind", "text"), BACKWARD, ids=arguments(BACKWARD))
def test_bad_backward_arguments_raise(
    changed: dict[str, Any], kind: type[Exception], text: str
) -> None:
    backward()
    backward(dlse=None)
    with pytest.raises(kind, match=text):
        backward(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"q": Q[:, :, :0]}, {"k": K[:, :, :0], "v": V[:, :, :0]}, {"v": V[..., :1]},
        {"scale": 2}, {"scale": np.float32(0.5)}, {"scale": -1.0}, {"scale": 0.0},
        *({"mask": np.ones(shape, dtype)} for dtype in (bool, "f4", "f2", ml_dtypes.bfloat16)
          for shape in ((7,), (5, 7), (1, 7), (4, 1, 7), (2, 1, 1, 7), (2, 4, 5, 7))),
        {"mask": lambda b, h, q_index, kv_index: None},
        *({"q": Q.astype(d), "k": K.astype(d), "v": V.astype(d)}
          for d in ("f2", "f4", ml_dtypes.bfloat16)),
    ],
)  # fmt: skip
def test_good_arguments_are_accepted(changed: dict[str, Any]) -> None:
    attention(**changed)


@pytest.mark.parametrize("function", ["forward", "backward"])
@pytest.mark.parametrize(
    ("changed", "kind", "text"),
    [
        ({"q": Q[0]}, ValueError, says("q", "(4, 5, 8)")),
        ({"mask": np.ones((1, 1, 1, 1))}, ValueError, says("mask", 7, "(1, 1, 1, 1)")),
        ({"mask": np.ones((4, 7))}, ValueError, says("mask", 5, "(4, 7)")),
        ({"q": Q.astype(int)}, TypeError, says("q", "int64")),
    ],
    ids=["axes of q", "keys of mask", "queries of mask", "dtype of q"],
)
def test_full_attention_checks_its_arguments(
    function: str, changed: dict[str, Any], kind: type[Exception], text: str
) -> None:
    given = {"q": Q, "k": K, "v": V, "mask": None, **changed}
    arrays = given["q"], given["k"], given["v"]
    out, lse = np.zeros((2, 4, 5, 3)), np.zeros((2, 4, 5))
    calls = {
        "forward": lambda: reference.full_attention(*arrays, mask=given["mask"]),
        "backward": lambda: reference.full_attention_backward(
            out, *arrays, out, lse, mask=given["mask"]
        ),
    }
    with pytest.raises(kind, match=text):
        calls[function]()


def test_full_attention_backward_checks_dlse() -> None:
    out, lse = np.zeros((2, 4, 5, 3)), np.zeros((2, 4, 5))
    with pytest.raises(ValueError, match=says("dlse", "(2, 4, 5, 3)")):
        reference.full_attention_backward(out, Q, K, V, out, lse, dlse=out)


def test_error_of_lowest_rank_is_raised() -> None:
    def fn(comm: Any) -> str:
        errors = [None, KeyError("low"), OSError("high")]
        with pytest.raises(KeyError) as raised:
            raise_together(errors[comm.rank], comm)
        return str(raised.value.args[0])

    assert reference.run_ranks(2, lambda comm: raise_together(None, comm)) == [None, None]
    texts = reference.run_ranks(3, fn)
    assert [text.removeprefix('"').removesuffix('"') for text in texts] == [
        "'low' (on rank 1 of 3)"
    ] * 3


def test_dtype_names() -> None:
    class Tensor:
        dtype = "torch.bfloat16"

    assert dtype_name(Tensor()) == "bfloat16"
    assert dtype_name(np.zeros(1, ml_dtypes.bfloat16)) == "bfloat16"
    assert [accumulator(d) for d in FLOATS.split(", ")] == ["float32"] * 3 + ["float64"]


HINT = "; a mask is given as mask="


class Own(np.ndarray[Any, Any]):
    """A user's array."""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.ones((5, 7), bool), f"ndarray of shape (5, 7){HINT}"),
        (max, f"builtin_function_or_method max{HINT}"),
        (None, "NoneType"),
        (int, "type"),
    ],
)
def test_bad_communicator_raises(given: Any, words: str) -> None:
    calls = (
        lambda: reference.cross_attention(Q, K, V, given),
        lambda: reference.Layout.agree(Q, K, V, given),
        lambda: reference.shard(Q, given),
        lambda: reference.unshard(Q, given),
    )
    for call in calls:
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value) == f"comm: expected a communicator, got {words}"


def test_library_is_the_package_of_the_array_type() -> None:
    assert (library(Q), library(fake_cupy.asarray(Q))) == ("numpy", "fake_cupy")
    assert library(Q.view(Own)) == library(np.ma.masked_array(Q)) == "numpy"
    attention(q=Q.view(Own), k=K.view(Own))
    assert array_module(Q) is np
    assert array_module(fake_cupy.asarray(Q)) is fake_cupy


def test_array_of_another_library_raises() -> None:
    with pytest.raises(TypeError) as raised:
        array_module(Alone())
    assert str(raised.value) == "q: expected a NumPy or CuPy array, got Alone of tests"

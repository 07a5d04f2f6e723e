"""What a user may give, and the exact words for what may not be given."""

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
    dtype_name,
    library,
    raise_together,
)
from lvxattn.mpi_impl.transport.device import array_module
from tests import fake_cupy

FLOATS = "float16, bfloat16, float32, float64"
Q, K, V = np.zeros((2, 4, 5, 8)), np.zeros((2, 2, 7, 8)), np.zeros((2, 2, 7, 3))


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


SHAPES = [
    ({"q": Q[0]}, "q: expected 4 axes (B, H, s_q, D), got shape (4, 5, 8)"),
    ({"k": K[None]}, "k: expected 4 axes (B, H_KV, s_kv, D), got shape (1, 2, 2, 7, 8)"),
    ({"v": V[0, 0]}, "v: expected 4 axes (B, H_KV, s_kv, D_V), got shape (7, 3)"),
    (
        {"q": Q[:0]},
        "q: expected every axis of (B, H, s_q, D) but the length to be at least 1, "
        "got shape (0, 4, 5, 8)",
    ),
    (
        {"k": K[:, :0]},
        "k: expected every axis of (B, H_KV, s_kv, D) but the length to be at least 1, "
        "got shape (2, 0, 7, 8)",
    ),
    (
        {"v": V[..., :0]},
        "v: expected every axis of (B, H_KV, s_kv, D_V) but the length to be at least 1, "
        "got shape (2, 2, 7, 0)",
    ),
    ({"k": K[:1]}, "k: expected B = 2 on axis 0 as in q, got shape (1, 2, 7, 8)"),
    ({"k": K[..., :4]}, "k: expected D = 8 on axis 3 as in q, got shape (2, 2, 7, 4)"),
    ({"v": V[:1]}, "v: expected B = 2 on axis 0 as in q, got shape (1, 2, 7, 3)"),
    ({"v": V[:, :1]}, "v: expected H_KV = 2 on axis 1 as in k, got shape (2, 1, 7, 3)"),
    ({"v": V[:, :, :6]}, "v: expected s_kv = 7 on axis 2 as in k, got shape (2, 2, 6, 3)"),
    (
        {"q": Q[:, :3]},
        "k: expected H_KV to divide q's H = 3, got H_KV = 2 in shape (2, 2, 7, 8)",
    ),
    ({"scale": inf}, "scale: expected a finite number, got inf"),
    ({"scale": nan}, "scale: expected a finite number, got nan"),
    (
        {"mask": np.ones((1, 1, 1, 1, 7))},
        "mask: expected a shape that broadcasts to (B, H, S_Q, s_kv) = (2, 4, S_Q, 7), "
        "got (1, 1, 1, 1, 7)",
    ),
    (
        {"mask": np.ones(())},
        "mask: expected a shape that broadcasts to (B, H, S_Q, s_kv) = (2, 4, S_Q, 7), got ()",
    ),
    (
        {"mask": np.ones((3, 1, 1, 7))},
        "mask: expected a shape that broadcasts to (B, H, S_Q, s_kv) = (2, 4, S_Q, 7), "
        "got (3, 1, 1, 7)",
    ),
    (
        {"mask": np.ones((2, 1, 7))},
        "mask: expected a shape that broadcasts to (B, H, S_Q, s_kv) = (2, 4, S_Q, 7), "
        "got (2, 1, 7)",
    ),
    (
        {"mask": np.ones((1, 1, 1, 1))},
        "mask: expected its last axis to be exactly the keys, s_kv = 7, got (1, 1, 1, 1)",
    ),
    (
        {"mask": np.ones((4, 7))},
        "mask: expected its query axis to be 1 or all queries, S_Q = 5, got (4, 7)",
    ),
]

KINDS = [
    ({"q": [[0.0]]}, "q: expected an array, got list [[0.0]]"),
    ({"k": None}, "k: expected an array, got NoneType None"),
    ({"v": "x" * 60}, "v: expected an array, got str '" + "x" * 39),
    ({"q": Q.astype(int)}, f"q: expected one of {FLOATS}, got int64"),
    ({"k": K > 0}, f"k: expected one of {FLOATS}, got bool"),
    ({"v": V + 0j}, f"v: expected one of {FLOATS}, got complex128"),
    ({"q": Q.astype(np.longdouble)}, f"q: expected one of {FLOATS}, got {np.longdouble(0).dtype}"),
    ({"k": K.astype("f4")}, "k: expected q's dtype float64, got float32"),
    ({"v": V.astype("f2")}, "v: expected q's dtype float64, got float16"),
    ({"q": np.ma.masked_array(Q)}, "q: expected a plain array and mask=, got a masked array"),
    ({"scale": 10**400}, f"scale: expected a finite number, got {10**400!r:.40}"),
    ({"k": fake_cupy.asarray(K)}, "k: expected a numpy array as q is, got fake_cupy"),
    ({"q": fake_cupy.asarray(Q)}, "k: expected a fake_cupy array as q is, got numpy"),
    ({"mask": fake_cupy.asarray(V)}, "mask: expected a numpy array as q is, got fake_cupy"),
    ({"scale": "1"}, "scale: expected a real number or None, got str '1'"),
    ({"scale": True}, "scale: expected a real number or None, got bool True"),
    ({"scale": 1j}, "scale: expected a real number or None, got complex 1j"),
    (
        {"mask": np.ones(7, int)},
        "mask: expected bool (True = may attend) or an additive floating dtype, got int64",
    ),
    ({"mask": [True] * 2}, "mask: expected an array, got list [True, True]"),
]  # fmt: skip

BACKWARD = [
    ({"dout": None}, "dout: expected an array, got NoneType None"),
    ({"lse": np.zeros((2, 4, 5), int)}, f"lse: expected one of {FLOATS}, got int64"),
    ({"dlse": fake_cupy.asarray(Q)}, "dlse: expected a numpy array as q is, got fake_cupy"),
    ({"dout": Q}, "dout: expected shape (B, H, s_q, D_V) = (2, 4, 5, 3), got (2, 4, 5, 8)"),
    ({"out": V}, "out: expected shape (B, H, s_q, D_V) = (2, 4, 5, 3), got (2, 2, 7, 3)"),
    (
        {"lse": np.zeros((2, 4, 5, 1))},
        "lse: expected shape (B, H, s_q) = (2, 4, 5), got (2, 4, 5, 1)",
    ),
    ({"dlse": np.zeros((2, 4))}, "dlse: expected shape (B, H, s_q) = (2, 4, 5), got (2, 4)"),
]


def refusal(check: Any, changed: dict[str, Any]) -> str:
    """Return the error's text, once its type is seen to fit: a wrong kind or a wrong value."""
    with pytest.raises((TypeError, ValueError)) as raised:
        check(**changed)
    text = str(raised.value)
    kinds = (
        "an array",
        "a plain array",
        "array as q is",
        "one of",
        "dtype",
        "a real number",
    )
    assert raised.type is (TypeError if any(kind in text for kind in kinds) else ValueError)
    return text


def named(x: Any) -> str:
    return f"{next(iter(x))}" if isinstance(x, dict) else x


@pytest.mark.parametrize(("changed", "text"), SHAPES + KINDS, ids=named)
def test_attention_s_arguments(changed: dict[str, Any], text: str) -> None:
    attention()
    assert refusal(attention, changed) == text


@pytest.mark.parametrize(("changed", "text"), BACKWARD, ids=named)
def test_the_backward_s_arguments(changed: dict[str, Any], text: str) -> None:
    backward()
    backward(dlse=None)
    assert refusal(backward, changed) == text


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
def test_what_may_be_given_is_accepted(changed: dict[str, Any]) -> None:
    attention(**changed)


@pytest.mark.parametrize("function", ["forward", "backward"])
@pytest.mark.parametrize(
    ("changed", "text"), [SHAPES[0], SHAPES[-1], SHAPES[-2], KINDS[3]], ids=named
)
def test_full_attention_checks_its_arguments(
    function: str, changed: dict[str, Any], text: str
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
    with pytest.raises((TypeError, ValueError)) as raised:
        calls[function]()
    assert str(raised.value) == text


def test_full_attention_backward_checks_what_it_takes_beside() -> None:
    out, lse = np.zeros((2, 4, 5, 3)), np.zeros((2, 4, 5))
    with pytest.raises(ValueError, match=r"^dlse: expected shape"):
        reference.full_attention_backward(out, Q, K, V, out, lse, dlse=out)


def test_the_error_of_the_lowest_rank_that_has_one_is_raised() -> None:
    def fn(comm: Any) -> str:
        errors = [None, KeyError("low"), OSError("high")]
        with pytest.raises(KeyError) as raised:
            raise_together(errors[comm.rank], comm)
        return str(raised.value.args[0])

    texts = reference.run_ranks(3, fn)
    assert [text.removeprefix('"').removesuffix('"') for text in texts] == [
        "'low' (on rank 1 of 3)"
    ] * 3


def test_nothing_is_raised_where_no_rank_has_an_error() -> None:
    assert reference.run_ranks(2, lambda comm: raise_together(None, comm)) == [None, None]


def test_dtypes_go_by_their_plain_names() -> None:
    class Tensor:
        dtype = "torch.bfloat16"

    assert dtype_name(Tensor()) == "bfloat16"
    assert dtype_name(np.zeros(1, ml_dtypes.bfloat16)) == "bfloat16"
    assert [accumulator(d) for d in FLOATS.split(", ")] == ["float32"] * 3 + ["float64"]


class Own(np.ndarray[Any, Any]):
    """A user's array."""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.ones((5, 7), bool), "ndarray of shape (5, 7); a mask is given as mask="),
        (max, "builtin_function_or_method max; a mask is given as mask="),
        (None, "NoneType"),
        (int, "type"),
    ],
)
def test_what_is_given_instead_of_ranks_is_named(given: Any, words: str) -> None:
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


def test_libraries_go_by_the_package_of_the_array_s_type_or_its_base_s() -> None:
    assert (library(Q), library(fake_cupy.asarray(Q))) == ("numpy", "fake_cupy")
    assert library(Q.view(Own)) == library(np.ma.masked_array(Q)) == "numpy"
    attention(q=Q.view(Own), k=K.view(Own))
    assert array_module(Q) is np
    assert array_module(fake_cupy.asarray(Q)) is fake_cupy


def test_arrays_of_another_library_are_refused() -> None:
    with pytest.raises(TypeError) as raised:
        array_module(Alone())
    assert str(raised.value) == "q: expected a NumPy or CuPy array, got Alone of tests"

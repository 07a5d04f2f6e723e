"""Arguments that the front doors reject before they agree on a layout."""

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from lvxattn import mpi_impl, reference
from tests import fake_cupy

X = np.ones((1, 1, 2, 2))


@pytest.mark.parametrize(
    ("comm", "got"), [(MPI.COMM_NULL, "COMM_NULL"), (None, "NoneType"), (3, "int")]
)
def test_mpi_requires_communicator(comm: Any, got: str) -> None:
    message = rf"^comm: expected an MPI.Intracomm, got {got}$"
    with pytest.raises(TypeError, match=message):
        mpi_impl.cross_attention(X, X, X, comm)
    with pytest.raises(TypeError, match=message):
        mpi_impl.cross_attention_backward(X, X, X, X, X, X[..., 0], comm)


def test_reference_requires_numpy_arrays() -> None:
    x = fake_cupy.asarray(X)
    message = "^q: expected a NumPy array, got ndarray of fake_cupy"
    with pytest.raises(TypeError, match=message):
        reference.full_attention(x, x, x)
    with pytest.raises(TypeError, match=message):
        reference.run_ranks(2, lambda comm: reference.cross_attention(x, x, x, comm))


@pytest.mark.parametrize("schedule", ["lv-xattn", "ring"])
def test_dout_is_cast_to_dtype_of_q(schedule: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 2, 5, 4)).astype("f4") for _ in range(4))
    q, k, v = (x.astype("f2") for x in (q, k, v))
    options: Any = {"schedule": schedule}
    out, lse = mpi_impl.cross_attention(q, k, v, MPI.COMM_SELF, **options)
    wide, narrow = (
        mpi_impl.cross_attention_backward(d, q, k, v, out, lse, MPI.COMM_SELF, **options)
        for d in (dout, dout.astype("f2"))
    )
    assert all(np.array_equal(a, b) for a, b in zip(wide, narrow, strict=True))


def test_mask_below_accumulator_range_hides() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 5, 4)).astype("f4") for _ in range(3))
    hidden = np.array([0, 1, 0, 0, 1], bool)
    lowest = np.where(hidden, np.finfo("f8").min, 0.0)
    by_number, by_rule = (
        mpi_impl.cross_attention(q, k, v, MPI.COMM_SELF, mask=mask) for mask in (lowest, ~hidden)
    )
    assert all(np.array_equal(a, b) for a, b in zip(by_number, by_rule, strict=True))

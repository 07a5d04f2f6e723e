"""A short soak run; `make soak` is the long one."""

import re

import pytest

from tests.launch import PROGRAMS, mpiexec


@pytest.mark.mpi
def test_soak() -> None:
    ended = mpiexec(4, PROGRAMS / "soak.py", "40", "5000", timeout=90)
    assert (ended.status, ended.err) == (0, ""), ended.out
    assert re.search(r"^40 problems, .* worst error 0\.\d+ of its limit$", ended.out, re.M)
    assert "0 wrong; " in ended.out

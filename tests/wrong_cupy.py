"""Device arrays that MPI gets wrong: of a longer message the last byte comes back changed."""

from typing import Any

from tests.fake_cupy import __version__, asarray, cuda, empty, ones, uint8, zeros  # noqa: F401
from tests.fake_cupy import asnumpy as right


def asnumpy(a: Any) -> Any:
    host = right(a)
    if host.size > 1:
        host[-1] ^= 1
    return host

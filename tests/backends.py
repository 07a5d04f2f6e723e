"""The ways to compute a block: the reference, and mpi_impl on NumPy and on a device's arrays."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from lvxattn import mpi_impl, reference
from lvxattn.reference.validation import accumulator
from tests import fake_cupy


@dataclass(frozen=True)
class Backend:
    """One implementation on one kind of array."""

    name: str
    implementation: ModuleType
    xp: Any

    @property
    def fp64(self) -> bool:
        """Whether it computes in fp64 whatever the inputs."""
        return self.implementation is reference

    def wide(self, dtype: Any) -> Any:
        """Return the dtype of sums for inputs of this dtype."""
        return np.dtype("float64" if self.fp64 else accumulator(str(np.dtype(dtype))))

    def array(self, x: Any) -> Any:
        """Return a NumPy array as the backend wants it; anything else as it is."""
        if not isinstance(x, np.ndarray):
            return x
        if self.fp64 and x.dtype != bool:
            return x.astype(np.float64)
        return x if self.xp is np else self.xp.asarray(x)


def host(x: Any) -> np.ndarray[Any, Any]:
    """Return a backend's array as a NumPy array."""
    return x if isinstance(x, np.ndarray) else fake_cupy.asnumpy(x)


REFERENCE = Backend("reference", reference, np)
MPI_NUMPY = Backend("mpi, NumPy", mpi_impl, np)
MPI_DEVICE = Backend("mpi, device", mpi_impl, fake_cupy)
BACKENDS = (REFERENCE, MPI_NUMPY, MPI_DEVICE)

"""A program of one process that sends device memory to itself, and checks what arrives.

    python -m lvxattn.mpi_impl.transport.self_test cupy 0

It may crash, hang or receive wrong bytes: `cuda_aware` runs and watches it.
"""

import sys
from importlib import import_module

import numpy as np
from mpi4py import MPI

from .cuda_aware import ARRIVED

# MPI sends short and long messages by different protocols.
SIZES = 1, 2**12, 2**22


def main(package: str, device: int) -> None:
    """Send arrays, and compare what arrives.

    Parameters
    ----------
    package : str
        The name of cupy.
    device : int
    """
    xp = import_module(package)
    with xp.cuda.Device(device):
        for size in SIZES:
            right = np.arange(size, dtype=np.int64).astype(np.uint8)
            there, here = xp.asarray(right), xp.zeros(size, xp.uint8)
            xp.cuda.Device().synchronize()
            requests = (
                MPI.COMM_SELF.Irecv([here, MPI.BYTE], 0),
                MPI.COMM_SELF.Isend([there, MPI.BYTE], 0),
            )
            MPI.Request.Waitall(list(requests))
            if not np.array_equal(xp.asnumpy(here), right):
                sys.exit(f"of {size} bytes some arrived wrong")
    sys.stdout.write(ARRIVED)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

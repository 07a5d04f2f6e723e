"""The ranks and arrays of ``python -m lvxattn.mpi_impl run``: MPI, and NumPy or CuPy.

The rest is `lvxattn.cli`.
"""

import os
import socket
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from lvxattn.cli.tensors import Array, InputError
from lvxattn.common.launcher import claim
from lvxattn.common.meter import Meter
from lvxattn.common.validation import raise_together
from lvxattn.mpi_impl.cross_attention import cross_attention, cross_attention_backward
from lvxattn.mpi_impl.kernels import choose
from lvxattn.mpi_impl.transport.device import limit_blas_threads, obstacle, use_device
from lvxattn.mpi_impl.transport.watchdog import Watchdog, wait, watching
from lvxattn.plan.choose import Layout
from lvxattn.plan.machine import Machine

T = TypeVar("T")

_NUMBERS = 7003
"""Tag of the numbers that clocks are compared by."""


@dataclass(frozen=True)
class Backend:
    """The arrays and the device of one rank; `lvxattn.cli.run_ranks.Backend`.

    Attributes
    ----------
    xp : module
        numpy or cupy.
    device : str
        The device's name.
    comm : mpi4py.MPI.Intracomm
    """

    xp: Any
    device: str
    comm: MPI.Intracomm

    def put(self, x: Array) -> Any:
        """Copy a NumPy array to the device."""
        return self.xp.asarray(x)

    def get(self, x: Any) -> Array:
        """Copy an array to the host."""
        host: Array = x if self.xp is np else self.xp.asnumpy(x)
        return host

    def finish(self) -> None:
        """Wait for the device."""
        if self.xp is not np:
            self.xp.cuda.Device().synchronize()

    def agree(
        self,
        tensors: dict[str, Any],
        *,
        schedule: str,
        scale: float | None,
        grid: tuple[int, int] | None,
        machine: Machine | None,
    ) -> Layout:
        """Return the layout of these tensors.  Collective: every rank of comm calls this."""
        q, k, v, mask = (tensors.get(name) for name in ("q", "k", "v", "mask"))
        with watching(self.comm, "all ranks to agree on a layout"):
            layout = Layout.agree(
                q, k, v, self.comm,
                schedule=schedule, scale=scale, mask=mask, grid=grid, machine=machine,
            )  # fmt: skip
        error = None
        try:
            self.kernel(tensors)  # compiles it, so that no pass is measured with that
        except (RuntimeError, ValueError) as problem:
            error = ValueError(str(problem))
        raise_together(error, MPIRanks(self.comm))
        return layout

    def kernel(self, tensors: dict[str, Any]) -> str:
        """Return the kernel for blocks such as this rank's, and why; empty for NumPy."""
        if self.xp is np:
            return ""
        q, k, v, mask = (tensors.get(name) for name in ("q", "k", "v", "mask"))
        return str(choose(q, k, v, mask))

    def forward(self, tensors: dict[str, Any], layout: Layout, meter: Meter) -> dict[str, Any]:
        """Return out and lse.  Collective: every rank of comm calls this."""
        q, k, v, mask = (tensors.get(name) for name in ("q", "k", "v", "mask"))
        out, lse = cross_attention(q, k, v, self.comm, mask=mask, layout=layout, meter=meter)
        return {"out": out, "lse": lse}

    def backward(
        self, tensors: dict[str, Any], results: dict[str, Any], layout: Layout, meter: Meter
    ) -> dict[str, Any]:
        """Return dq, dk and dv.  Collective: every rank of comm calls this."""
        dout, q, k, v = (tensors[name] for name in ("dout", "q", "k", "v"))
        out, lse, mask = results["out"], results["lse"], tensors.get("mask")
        dq, dk, dv = cross_attention_backward(
            dout, q, k, v, out, lse, self.comm, mask=mask, layout=layout, meter=meter
        )
        return {"dq": dq, "dk": dk, "dv": dv}


class MPIRanks:
    """The ranks of a communicator as `lvxattn.cli.run_ranks.Ranks`, seen from one of them.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
    rank, size : int
    launched : bool
    hosts : list of str
        By rank, once `limit_threads` has asked.
    patience : float or None
        Seconds that a wait may take, unless ``LVXATTN_TIMEOUT`` says otherwise; None: any.
    """

    def __init__(self, comm: MPI.Intracomm, patience: float | None = None) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.hosts: list[str] = []
        self.patience = patience
        self.launched = claim(os.environ) is not None

    def allgather(self, sendobj: T) -> list[T]:
        """Return the objects of all ranks.  Collective: every rank calls this."""
        with self.watching("all ranks' objects to be gathered"):
            return self.comm.allgather(sendobj)

    def bcast(self, obj: T) -> T:
        """Return rank 0's object.  Collective: every rank calls this."""
        with self.watching("rank 0's object"):
            shared: T = self.comm.bcast(obj)
            return shared

    def gather(self, sendobj: T) -> list[T] | None:
        """Return the objects of all ranks on rank 0.  Collective: every rank calls this."""
        with self.watching("all ranks' objects to be gathered"):
            return self.comm.gather(sendobj)

    def limit_threads(self) -> int:
        """Divide each host's cores among its ranks.  Collective: every rank calls this."""
        with self.watching("all ranks to count their threads"):
            self.hosts = self.comm.allgather(socket.gethostname())
            return limit_blas_threads(self.comm)

    def backend(self, wish: str, dtype: str) -> Backend:
        """Choose NumPy or CuPy: see `choose_backend`.  Collective: every rank calls this."""
        return choose_backend(wish, dtype, self.comm)

    def start_together(self) -> None:
        """Wait for all ranks.  Collective: every rank calls this."""
        with self.watching("all ranks to start"):
            self.comm.Barrier()

    def send(self, number: float, dest: int) -> None:
        """Send a number to a rank that calls `receive`."""
        self.comm.Send(np.array([number]), dest, _NUMBERS)

    def receive(self, source: int) -> float:
        """Receive a number from a rank that calls `send`; a long wait sleeps."""
        room = np.empty(1)
        request = self.comm.Irecv(room, source, _NUMBERS)
        wait(request, Watchdog.armed(self.comm), lambda: f"a number from rank {source}")
        return float(room[0])

    def watching(self, what: str) -> AbstractContextManager[None]:
        """Limit a wait, and name what is awaited."""
        return watching(self.comm, what, self.patience, self.hosts)


def choose_backend(wish: str, dtype: str, comm: MPI.Intracomm) -> Backend:
    """Assign GPUs to the ranks of each host, or NumPy.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    wish : str
        ``"cpu"``, ``"gpu"``, or ``"auto"``: GPUs if every rank has one.
    dtype : str
        The tensors' dtype.
    comm : mpi4py.MPI.Intracomm

    Raises
    ------
    InputError
        GPUs are required and a rank has none, or cannot compute on it; the same on all ranks.
    """
    ranks = MPIRanks(comm)
    host = Backend(np, f"CPU, {len(os.sched_getaffinity(0))} cores", comm)
    if wish == "cpu":
        return host
    problem = _obstacle(dtype)
    if wish == "gpu":
        raise_together(InputError(problem) if problem else None, ranks)
    elif any(ranks.allgather(problem)):
        return host
    xp = import_module("cupy")
    device = use_device(comm, xp)
    problem = obstacle(xp)
    raise_together(InputError(f"{problem}; or take --device cpu") if problem else None, ranks)
    name = xp.cuda.runtime.getDeviceProperties(device)["name"].decode()
    return Backend(xp, f"GPU {device} {name}", comm)


def _obstacle(dtype: str) -> str | None:
    """Return why this rank cannot compute on a GPU, or None.

    Touches no GPU: they are assigned later.
    """
    try:
        cupy = import_module("cupy")
        count = cupy.cuda.runtime.getDeviceCount()
    except ModuleNotFoundError:
        return "--device gpu: CuPy is not installed; the extras cuda12 and cuda13 have it"
    except Exception as error:  # no driver: CuPy raises various types
        return f"--device gpu: {error}"
    if dtype == "bfloat16" and int(cupy.__version__.partition(".")[0]) < 14:
        return f"--device gpu: bfloat16 needs CuPy 14, and here is {cupy.__version__}"
    return None if count else "--device gpu: no GPU found"

"""Where a rank computes: NumPy on the host's cores, or CuPy on a GPU of its own."""

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.cli.tensors import Array, InputError
from lvxattn.common.meter import Meter
from lvxattn.common.validation import raise_together
from lvxattn.mpi_impl.cross_attention import cross_attention, cross_attention_backward
from lvxattn.mpi_impl.kernels import choose
from lvxattn.mpi_impl.transport.device import obstacle, use_device
from lvxattn.plan.choose import Layout
from lvxattn.plan.machine import Machine


@dataclass(frozen=True)
class Backend:
    """One rank's device.

    Attributes
    ----------
    xp : module
        numpy or cupy.
    device : str
        Its name.
    comm : mpi4py.MPI.Intracomm
    """

    xp: Any
    device: str
    comm: MPI.Intracomm

    def put(self, x: Array) -> Any:
        """Bring a NumPy array there."""
        return self.xp.asarray(x)

    def get(self, x: Any) -> Array:
        """Bring an array back."""
        host: Array = x if self.xp is np else self.xp.asnumpy(x)
        return host

    def finish(self) -> None:
        """Wait until everything is computed."""
        if self.xp is not np:
            self.xp.cuda.Device().synchronize()

    def agree(
        self,
        tensors: dict[str, Any],
        *,
        schedule: str,
        scale: float | None,
        machine: Machine | None,
    ) -> Layout:
        """Return the layout of these tensors.  Collective: every rank of comm calls this."""
        q, k, v, mask = (tensors.get(name) for name in ("q", "k", "v", "mask"))
        layout = Layout.agree(
            q, k, v, self.comm, schedule=schedule, scale=scale, mask=mask, machine=machine
        )
        error = None
        try:
            self.kernel(tensors)  # which compiles: nothing of that is measured
        except (RuntimeError, ValueError) as problem:
            error = ValueError(str(problem))
        raise_together(error, self.comm)
        return layout

    def kernel(self, tensors: dict[str, Any]) -> str:
        """Say what attends to blocks such as this rank's, and why; nothing of NumPy's."""
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


def choose_backend(wish: str, dtype: str, comm: MPI.Intracomm) -> Backend:
    """Give each rank of a host a GPU of its own, or NumPy where that is not to be.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    wish : str
        ``"cpu"``, ``"gpu"`` or ``"auto"``: GPUs where every rank has one.
    dtype : str
        Of the tensors.
    comm : mpi4py.MPI.Intracomm

    Raises
    ------
    InputError
        GPUs are wanted and a rank has none, or has one and cannot compute on it; the same on all
        ranks.
    """
    if wish == "cpu":
        return _host(comm)
    problem = _obstacle(dtype)
    if wish == "gpu":
        raise_together(InputError(problem) if problem else None, comm)
    elif any(comm.allgather(problem)):
        return _host(comm)
    xp = import_module("cupy")
    device = use_device(comm, xp)
    problem = obstacle(xp)
    raise_together(InputError(f"{problem}; or take --device cpu") if problem else None, comm)
    name = xp.cuda.runtime.getDeviceProperties(device)["name"].decode()
    return Backend(xp, f"GPU {device} {name}", comm)


def _host(comm: MPI.Intracomm) -> Backend:
    return Backend(np, f"CPU, {len(os.sched_getaffinity(0))} cores", comm)


def _obstacle(dtype: str) -> str | None:
    """Say why this rank cannot compute on a GPU, if so.

    Touches no GPU: which one is this rank's is not settled yet.
    """
    try:
        cupy = import_module("cupy")
        count = cupy.cuda.runtime.getDeviceCount()
    except ModuleNotFoundError:
        return "--device gpu: CuPy is not installed; the extras cuda12 and cuda13 have it"
    except Exception as error:  # no driver: whatever CuPy raises then
        return f"--device gpu: {error}"
    if dtype == "bfloat16" and int(cupy.__version__.partition(".")[0]) < 14:
        return f"--device gpu: bfloat16 needs CuPy 14, and here is {cupy.__version__}"
    return None if count else "--device gpu: no GPU found"

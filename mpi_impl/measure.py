"""The probes of `lvxattn.plan.measure` over MPI."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn.common.validation import accumulator
from lvxattn.plan.choose import Layout
from lvxattn.plan.machine import Machine
from lvxattn.plan.measure import measure as measure_with

from .block_attention import block_attention, block_attention_backward
from .cross_attention import cross_attention, cross_attention_backward
from .transport.buffers import buffer
from .transport.transfers import Transfer, Waited
from .transport.watchdog import Watchdog, any_rank, wait

_TAG = 7010


def measure(
    comm: MPI.Intracomm,
    *,
    H: int = 8,
    H_KV: int | None = None,
    D: int = 64,
    dtype: str = "float32",
    xp: Any = np,
    name: str = "here",
) -> Machine:
    """Measure this machine in a few seconds, for ``schedule="auto"`` and the planner.

    Collective: every rank of comm calls this.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    H, H_KV, D : int
        The numbers of heads and their width in the problems to come; default of H_KV: H.
    dtype : str
        Of q, k and v.
    xp : module
        numpy, or cupy on each rank's current device.
    name : str
        Of the machine.

    Returns
    -------
    lvxattn.plan.Machine
        The same on all ranks; `Machine.save` writes it to a file.

    Raises
    ------
    ValueError
        There are no such problems; raised on all ranks.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from lvxattn.mpi_impl import measure
    >>> machine = measure(MPI.COMM_WORLD)  # doctest: +SKIP
    """
    shape = H, H if H_KV is None else H_KV, D
    return measure_with(comm, Probe(comm, shape, dtype, xp), name)


class Probe:
    """One rank's part in the probes; `lvxattn.plan.measure.Probe`."""

    by = "mpi_impl"

    def __init__(
        self, comm: MPI.Intracomm, shape: tuple[int, int, int], dtype: str, xp: Any
    ) -> None:
        self.comm, self.shape, self.dtype, self.xp = comm, shape, dtype, xp

    @property
    def _numpy_dtype(self) -> Any:
        from lvxattn.cli.tensors import dtype_of  # with all that commands import

        return dtype_of(self.dtype)

    @property
    def room(self) -> float:
        """The rank's share of the memory of its device, or of its host, in bytes."""
        where, size = "", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.xp is not np:
            device = self.xp.cuda.Device()  # numbers of devices may be each rank's own
            where, size = device.pci_bus_id, device.mem_info[1]
        on_host = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        share = size / on_host.allgather(where).count(where)
        on_host.Free()
        return float(share)

    @property
    def device_name(self) -> str:
        """The name of the device that this rank computes on."""
        if self.xp is np:
            return f"CPU, {len(os.sched_getaffinity(0))} cores"
        here = self.xp.cuda.Device().id
        name: bytes = self.xp.cuda.runtime.getDeviceProperties(here)["name"]
        return f"GPU {name.decode()}"

    def prepare(
        self, s_q: int, s_kv: int, *, backward: bool = False,
        progress: Callable[[], None] = lambda: None,
    ) -> Callable[[], None]:  # fmt: skip
        """Return a function that computes the attention of one block, or its gradients."""
        xp, (H, H_KV, D) = self.xp, self.shape
        # Numbers of a usual size: the time of NumPy's exp depends on them.
        row = np.random.default_rng(self.comm.rank).standard_normal(D)
        row = row.astype(self._numpy_dtype)
        q, k, v = (
            xp.asarray(np.broadcast_to(row, (1, heads, s, D)).copy())  # (1, H or H_KV, s, D)
            for heads, s in ((H, s_q), (H_KV, s_kv), (H_KV, s_kv))
        )
        call: Callable[..., object] = partial(block_attention, q, k, v)
        if backward:
            wide = np.dtype(accumulator(self.dtype))
            lse, dk, dv = xp.zeros(q.shape[:3], wide), *(xp.zeros(k.shape, wide) for _ in "kv")
            call = partial(block_attention_backward, q, q, k, v, lse, lse, dk, dv)

        def work() -> None:
            call(scale=D**-0.5, progress=progress)
            if xp is not np:
                xp.cuda.get_current_stream().synchronize()

        return work

    def call(self, *, alone: bool, schedule: str = "lv-xattn") -> Callable[[], None]:
        """Return a function that runs forward and backward on little data."""
        H, H_KV, D = self.shape
        q, k = (self.xp.zeros((1, n, s, D), self._numpy_dtype) for n, s in ((H, 1), (H_KV, 2)))
        comm = MPI.COMM_SELF if alone else self.comm
        layout = Layout.agree(q, k, k, comm, schedule=schedule)

        def both() -> None:
            out, lse = cross_attention(q, k, k, comm, layout=layout)
            cross_attention_backward(out, q, k, k, out, lse, comm, layout=layout)
            if alone:  # the backward's only step that is not in the plan
                any_rank(self.comm, False, "all ranks to measure")

        return both

    def copy(self, nbytes: int, *, new: bool = False) -> Callable[[], None]:
        """Return a function that copies an array, into another one or into a new one."""
        # Not zeros: of those that nobody has written, the kernel keeps one page.
        x, there = (self.xp.ones(nbytes, np.uint8) for _ in range(2))

        def copy() -> None:
            if new:
                x.copy()
            else:
                there[...] = x
            if self.xp is not np:
                self.xp.cuda.get_current_stream().synchronize()

        return copy

    def shift(
        self, nbytes: int, left: int, right: int, block: tuple[int, int] = (0, 0), times: int = 0
    ) -> Callable[[], None]:
        """Return a function that sends a message to the right and receives one from the left.

        Meanwhile it computes a block, so many times.
        """
        there, here = buffer(self.xp, nbytes), buffer(self.xp, nbytes)
        transfers: list[Transfer] = []

        def progress() -> None:
            for transfer in transfers:
                transfer.Test()

        work = self.prepare(*block, progress=progress)

        def message() -> None:
            there.filled()
            (room, empty), (block, whole) = here.receivable(nbytes), there.sendable(nbytes)
            coming = Transfer(lambda: self.comm.Irecv([room, MPI.BYTE], left, _TAG), empty)
            going = Transfer(lambda: self.comm.Isend([block, MPI.BYTE], right, _TAG), whole)
            transfers[:] = coming, going
            for _ in range(times):
                work()
            watchdog = Watchdog.armed(self.comm)
            wait(Waited(coming, going.begin), watchdog, lambda: f"a probe from rank {left}")
            wait(Waited(going, coming.begin), watchdog, lambda: f"rank {right} to take a probe")
            here.deliver(nbytes)
            here.settle()

        return message

    def together(self) -> None:
        """Wait for all ranks, asleep: a rank that spins takes a core from those that work."""
        wait(self.comm.Ibarrier(), Watchdog.armed(self.comm), lambda: "all ranks to measure")

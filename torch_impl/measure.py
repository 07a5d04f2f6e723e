"""The probes of `lvxattn.plan.measure` in PyTorch."""

import os
import socket
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from lvxattn.plan.machine import Machine
from lvxattn.plan.measure import measure as measure_with

from .block_attention import block_attention, block_attention_backward
from .cross_attention import cross_attention
from .group import AnyGroup, Group, over_cpu
from .kernels.kernel_spec import accumulator_of
from .layout import Layout

_TAG = 7010


def measure(
    group: AnyGroup = None,
    *,
    H: int = 8,
    H_KV: int | None = None,
    D: int = 64,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    name: str = "here",
) -> Machine:
    """Measure this machine in a few seconds, for ``schedule="auto"`` and the planner.

    Collective: every rank of the group calls this.

    Parameters
    ----------
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        Default: the world.
    H, H_KV, D : int
        The numbers of heads and their width in the problems to come; default of H_KV: H.
    dtype : str
        Of q, k and v.
    device : torch.device
        The device of this rank.
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
    >>> from lvxattn.torch_impl import measure
    >>> machine = measure()  # doctest: +SKIP
    """
    ranks, shape = Group.of(group), (H, H if H_KV is None else H_KV, D)
    return measure_with(ranks, Probe(ranks, shape, dtype, torch.device(device)), name)


class Probe:
    """One rank's part in the probes; `lvxattn.plan.measure.Probe`."""

    by = "torch_impl"

    def __init__(
        self, group: Group, shape: tuple[int, int, int], dtype: str, device: torch.device
    ) -> None:
        self.group, self.shape, self.dtype, self.device = group, shape, dtype, device
        self.staged = device.type != "cpu" and over_cpu(group, device)

    @property
    def room(self) -> float:
        """The memory of the rank's device, or its share of the host's, in bytes."""
        hosts = self.group.allgather(socket.gethostname())
        if self.device.type != "cpu":
            return float(torch.cuda.get_device_properties(self.device).total_memory)
        ranks = hosts.count(socket.gethostname())
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks

    @property
    def device_name(self) -> str:
        """The name of the device that this rank computes on."""
        if self.device.type == "cpu":
            return f"CPU, {len(os.sched_getaffinity(0))} cores"
        return f"GPU {torch.cuda.get_device_name(self.device)}"

    def prepare(self, s_q: int, s_kv: int, *, backward: bool = False) -> Callable[[], None]:
        """Return a function that computes the attention of one block, or its gradients."""
        H, H_KV, D = self.shape
        q, k, v = (
            torch.randn(D, device=self.device).to(getattr(torch, self.dtype)).repeat(1, heads, s, 1)
            for heads, s in ((H, s_q), (H_KV, s_kv), (H_KV, s_kv))
        )
        call: Callable[..., object] = partial(block_attention, q, k, v)
        if backward:
            wide = accumulator_of(q)
            lse = q.new_zeros(q.shape[:3], dtype=wide)
            sums = [x.new_zeros(x.shape, dtype=wide) for x in (k, v)]
            call = partial(block_attention_backward, q, q, k, v, lse, lse, *sums)

        def work() -> None:
            call(scale=D**-0.5)
            self._finish()

        return work

    def call(self, *, alone: bool, schedule: str = "lv-xattn") -> Callable[[], None]:
        """Return a function that runs forward and backward on little data."""
        H, H_KV, D = self.shape
        dtype, group = getattr(torch, self.dtype), Group(None) if alone else self.group
        q, k = (
            torch.zeros(1, n, s, D, dtype=dtype, device=self.device) for n, s in ((H, 1), (H_KV, 2))
        )
        layout = Layout.agree(q, k, k, group, schedule=schedule)
        q.requires_grad_()

        def both() -> None:
            out = cross_attention(q, k, k, group, layout=layout)
            torch.autograd.grad(out, q, torch.ones_like(out))
            self._finish()

        return both

    def copy(self, nbytes: int, *, new: bool = False) -> Callable[[], None]:
        """Return a function that copies a tensor, into another one or into a new one."""
        # Not zeros: of those that nobody has written, the kernel keeps one page.
        x, there = (torch.ones(nbytes, dtype=torch.uint8, device=self.device) for _ in range(2))

        def copy() -> None:
            if new:
                x.clone()
            else:
                there.copy_(x)
            self._finish()

        return copy

    def shift(
        self, nbytes: int, left: int, right: int, block: tuple[int, int] = (0, 0), times: int = 0
    ) -> Callable[[], None]:
        """Return a function that sends a message to the right and receives one from the left.

        Meanwhile it computes a block, so many times.
        """
        group = self.group.group
        home = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        there, here = (x.cpu() if self.staged else x.clone() for x in (home, home))
        work = self.prepare(*block)

        def message() -> None:
            if self.staged:
                there.copy_(home)
            what = f"a probe from rank {left}, or rank {right} to take a probe"
            with self.group.waiting(lambda: what):
                posted = dist.batch_isend_irecv([
                    dist.P2POp(dist.isend, there, group=group, group_peer=right, tag=_TAG),
                    dist.P2POp(dist.irecv, here, group=group, group_peer=left, tag=_TAG),
                ])  # fmt: skip
                for _ in range(times):
                    work()
                for transfer in posted:
                    transfer.wait()
            if self.staged:
                home.copy_(here)
            self._finish()

        return message

    def together(self) -> None:
        """Wait for all ranks."""
        if self.group.size > 1:
            with self.group.waiting(lambda: "all ranks to measure"):
                dist.barrier(self.group.group)

    def _finish(self) -> None:
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)

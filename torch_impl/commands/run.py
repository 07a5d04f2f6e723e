"""The ranks and arrays of ``python -m lvxattn.torch_impl run``: torch's ranks and tensors.

The rest is `lvxattn.cli`.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lvxattn.cli.tensors import Array, dtype_of
from lvxattn.common.meter import Meter
from lvxattn.plan.machine import Machine
from lvxattn.torch_impl.commands.processes import choose_device, group_timeout, limit_threads
from lvxattn.torch_impl.cross_attention import cross_attention
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """The tensors and the device of one rank; `lvxattn.cli.run_ranks.Backend`.

    Attributes
    ----------
    where : torch.device
    group : Group
        The group that blocks are sent over.
    """

    where: torch.device
    group: Group

    @property
    def device(self) -> str:
        """The device's name."""
        if self.where.type == "cpu":
            return f"CPU, {len(os.sched_getaffinity(0))} cores"
        return f"GPU {self.where.index} {torch.cuda.get_device_name(self.where)}"

    def put(self, x: Array) -> Tensor:
        """Copy a NumPy array to the device."""
        if x.dtype.name != "bfloat16":
            return torch.from_numpy(x).to(self.where)
        # torch does not know ml_dtypes: the bits are passed as int16.
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.where)

    def get(self, x: Tensor) -> Array:
        """Copy a tensor to the host."""
        host = x.detach().cpu()
        if host.dtype != torch.bfloat16:
            return host.numpy()
        bits: Array = host.view(torch.int16).numpy()
        return bits.view(dtype_of("bfloat16"))

    def finish(self) -> None:
        """Wait for the device."""
        if self.where.type != "cpu":
            torch.cuda.synchronize(self.where)

    def agree(
        self,
        tensors: dict[str, Tensor],
        *,
        schedule: str,
        scale: float | None,
        grid: tuple[int, int] | None,
        machine: Machine | None,
    ) -> Layout:
        """Return the layout of these tensors.  Collective: every rank of the group calls this."""
        q, k, v = (tensors[name] for name in "qkv")
        mask = tensors.get("mask")
        return Layout.agree(
            q, k, v, self.group,
            schedule=schedule, scale=scale, mask=mask, grid=grid, machine=machine,
        )  # fmt: skip

    def kernel(self, tensors: dict[str, Tensor]) -> str:  # noqa: ARG002
        """Return nothing: the kernel differs from block to block."""
        return ""

    def forward(self, tensors: dict[str, Tensor], layout: Any, meter: Meter) -> dict[str, Tensor]:
        """Return out and lse.  Collective: every rank of the group calls this."""
        q, k, v = (tensors[name].requires_grad_("dout" in tensors) for name in "qkv")
        out, lse = cross_attention(
            q, k, v, self.group,
            mask=tensors.get("mask"), layout=layout, return_lse=True, meter=meter,
        )  # fmt: skip
        return {"out": out, "lse": lse}

    def backward(
        self,
        tensors: dict[str, Tensor],
        results: dict[str, Tensor],
        layout: Any,  # noqa: ARG002 - the graph holds layout and meter
        meter: Meter,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return dq, dk and dv.  Collective: every rank of the group calls this."""
        leaves = [tensors[name] for name in "qkv"]
        dq, dk, dv = torch.autograd.grad(results["out"], leaves, tensors["dout"])
        return {"dq": dq, "dk": dk, "dv": dv}


class TorchRanks:
    """The ranks of a process group as `lvxattn.cli.run_ranks.Ranks`, seen from one of them.

    Attributes
    ----------
    group : Group
    rank, size : int
    launched : bool
        False: torchrun passes its own stdout on, so that a terminal is seen as one.
    patience : timedelta or None
        Of `start_together`, unless ``LVXATTN_TIMEOUT`` says otherwise; None: PyTorch's own.
    """

    launched = False
    patience: timedelta | None = None

    def __init__(self, group: Group) -> None:
        self.group, self.rank, self.size = group, group.rank, group.size

    def allgather(self, sendobj: T) -> list[T]:
        """Return the objects of all ranks.  Collective: every rank calls this."""
        return self.group.allgather(sendobj)

    def limit_threads(self) -> int:
        """Divide each host's cores among its ranks.  Collective: every rank calls this."""
        return limit_threads(self.group)

    def backend(self, wish: str, dtype: str) -> Backend:  # noqa: ARG002 - PyTorch has every dtype
        """Choose a device.  Collective: every rank calls this."""
        return Backend(*choose_device(wish, self.group))

    def start_together(self) -> None:
        """Wait for all ranks.  Collective: every rank calls this."""
        if self.size > 1:
            with self.group.waiting(lambda: "all ranks to start"):
                if dist.get_backend(self.group.group) == "gloo":  # rank 0 names those that miss it
                    timeout = group_timeout() or self.patience
                    dist.monitored_barrier(self.group.group, timeout, wait_all_ranks=True)
                else:
                    dist.barrier(self.group.group)

    def send(self, number: float, dest: int) -> None:
        """Send a number to a rank that calls `receive`."""
        with self.group.waiting(lambda: f"rank {dest} to take a number"):
            x = torch.tensor([number], dtype=torch.float64)
            dist.send(x, group=self.group.group, group_dst=dest)

    def receive(self, source: int) -> float:
        """Receive a number from a rank that calls `send`."""
        with self.group.waiting(lambda: f"a number from rank {source}"):
            x = torch.empty(1, dtype=torch.float64)
            dist.recv(x, group=self.group.group, group_src=source)
        return float(x)

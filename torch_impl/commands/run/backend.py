"""Where a rank computes: PyTorch on the host's cores, or on a GPU."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvxattn.cli.tensors import Array, dtype_of
from lvxattn.common.meter import Meter
from lvxattn.plan.machine import Machine
from lvxattn.torch_impl.cross_attention import cross_attention
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.layout import Layout


@dataclass(frozen=True)
class Backend:
    """One rank's device.

    Attributes
    ----------
    where : torch.device
    group : Group
        What blocks travel over.
    """

    where: torch.device
    group: Group

    @property
    def device(self) -> str:
        """Return its name."""
        if self.where.type == "cpu":
            return f"CPU, {len(os.sched_getaffinity(0))} cores"
        return f"GPU {self.where.index} {torch.cuda.get_device_name(self.where)}"

    def put(self, x: Array) -> Tensor:
        """Bring a NumPy array there."""
        if x.dtype.name != "bfloat16":
            return torch.from_numpy(x).to(self.where)
        # torch knows nothing of ml_dtypes: the bits travel as int16.
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.where)

    def get(self, x: Tensor) -> Array:
        """Bring a tensor back."""
        host = x.detach().cpu()
        if host.dtype != torch.bfloat16:
            return host.numpy()
        bits: Array = host.view(torch.int16).numpy()
        return bits.view(dtype_of("bfloat16"))

    def finish(self) -> None:
        """Wait until everything is computed."""
        if self.where.type != "cpu":
            torch.cuda.synchronize(self.where)

    def agree(
        self,
        tensors: dict[str, Tensor],
        *,
        schedule: str,
        scale: float | None,
        machine: Machine | None,
    ) -> Layout:
        """Return the layout of these tensors.  Collective: every rank of the group calls this."""
        q, k, v = (tensors[name] for name in "qkv")
        mask = tensors.get("mask")
        return Layout.agree(
            q, k, v, self.group, schedule=schedule, scale=scale, mask=mask, machine=machine
        )

    def kernel(self, tensors: dict[str, Tensor]) -> str:  # noqa: ARG002
        """Say nothing: which one is taken differs from block to block."""
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
        layout: Any,  # noqa: ARG002 - the graph has it, and the meter
        meter: Meter,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return dq, dk and dv.  Collective: every rank of the group calls this."""
        leaves = [tensors[name] for name in "qkv"]
        dq, dk, dv = torch.autograd.grad(results["out"], leaves, tensors["dout"])
        return {"dq": dq, "dk": dk, "dv": dv}

"""The ways to compute a block: the reference, mpi_impl on either kind of array, torch's kernels."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch

from lvxattn import mpi_impl, reference, torch_impl
from lvxattn.common.validation import accumulator
from lvxattn.torch_impl.kernels import KERNELS, KernelSpec
from tests import fake_cupy
from tests.cases import Case

# Blocks are small here, and two threads on a busy machine wait for one another.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Backend:
    """One implementation on one kind of array."""

    name: str
    implementation: ModuleType
    xp: Any
    options: dict[str, Any] = field(default_factory=dict)  # of every call

    @property
    def fp64(self) -> bool:
        """Whether it computes in fp64 for inputs of any dtype."""
        return self.implementation is reference

    def wide(self, dtype: Any) -> Any:
        """Return the dtype of sums for inputs of this dtype."""
        return np.dtype("float64" if self.fp64 else accumulator(str(np.dtype(dtype))))

    def array(self, x: Any) -> Any:
        """Return a NumPy array as an array of the backend; anything else as it is."""
        if not isinstance(x, np.ndarray):
            return x
        if self.fp64 and x.dtype != bool:
            return x.astype(np.float64)
        if self.xp is torch:
            return tensor(x)
        return x if self.xp is np else self.xp.asarray(x)

    def backward(self, *given: Any, **options: Any) -> Any:
        """Return dq, and add to dk and dv, the last two of what is given, in place."""
        differentiate = self.implementation.block_attention_backward
        if self.xp is not torch:
            return differentiate(*given, **options)
        *given, dk, dv = given
        dq, dk_share, dv_share = differentiate(*given, **options)
        dk += dk_share
        dv += dv_share
        return dq

    def can(self, case: Case) -> bool:
        """Return whether it supports the case, forward and backward."""
        kernel = KERNELS.get(self.options.get("kernel", "auto"))
        if kernel is None:
            return True
        callables = ("callable", "documents", "earlier documents", "causal", "causal documents")
        kind = "none" if case.mask == "none" else "callable" if case.mask in callables else "array"
        sizes = (case.B, case.H, case.H_KV, case.S_Q, case.S_KV, case.D, case.D_V)
        mask_dtype = torch.float64 if case.mask == "additive" else torch.bool
        dtype = getattr(torch, case.dtype)
        job = KernelSpec("cpu", dtype, *sizes, mask=kind, mask_dtype=mask_dtype, backward=True)
        return kernel.unsupported(job) is None


def tensor(x: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a copy of a NumPy array as a tensor; torch does not know NumPy's bf16."""
    x = np.array(x)
    if str(x.dtype) == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def host(x: Any) -> np.ndarray[Any, Any]:
    """Return a backend's array as a NumPy array."""
    if isinstance(x, torch.Tensor):
        return x.numpy()
    return x if isinstance(x, np.ndarray) else fake_cupy.asnumpy(x)


REFERENCE = Backend("reference", reference, np)
MPI_NUMPY = Backend("mpi, NumPy", mpi_impl, np)
MPI_DEVICE = Backend("mpi, device", mpi_impl, fake_cupy)
TORCH_BLOCKED, TORCH_AUTO, TORCH_FLASH, TORCH_SPLIT = TORCH = tuple(
    Backend(f"torch, {kernel}", torch_impl, torch, {"kernel": kernel})
    for kernel in ("blocked", "auto", "cpu_flash", "split")
)
BACKENDS = (REFERENCE, MPI_NUMPY, MPI_DEVICE)
BLOCK_BACKENDS = (*BACKENDS, *TORCH)

"""The rules of `kernel="auto"`: the first that fits, of a kernel that supports the block, is used.

The rule for the CPU is based on benchmarks/results/kernels-cpu.json (two cores;
benchmarks/kernels.py measures another machine), those for CUDA on PyTorch's source only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lvxattn.torch_impl.kernels import KERNELS, split
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec


@dataclass(frozen=True)
class Rule:
    """A kernel, a condition under which it is used, and the reason."""

    kernel: str
    fits: Callable[[KernelSpec], bool]
    because: str


RULES = (
    Rule(
        "blocked",
        lambda spec: spec.device == "cuda" and spec.additive and not spec.backward,
        "only tiles give (top, total), and checking whether lse suffices would block the host",
    ),
    Rule(
        "cuda_flash",
        lambda spec: spec.device == "cuda",
        "the fastest for 16 bits in PyTorch's own order, splits by itself; not measured",
    ),
    Rule(
        "split",
        lambda spec: (
            spec.device == "cuda" and spec.dtype != torch.float64 and split.parts_for(spec) > 1
        ),
        "too few heads and rows to fill a GPU, and no kernel before splits by itself; not measured",
    ),
    Rule(
        "cudnn",
        lambda spec: spec.device == "cuda" and spec.H != spec.H_KV,
        "takes a bias and grouped heads as they are; not measured",
    ),
    Rule("efficient", lambda spec: spec.device == "cuda", "takes fp32 and a bias; not measured"),
    Rule(
        "blocked",
        lambda spec: spec.device == "cpu" and spec.backward and spec.wanted == "q",
        "3 matrix products instead of 5: s_q 16 to 1024: 0.50 to 0.80 of the time of cpu_flash",
    ),
    Rule(
        "blocked",
        lambda spec: (
            spec.device == "cpu"
            and not spec.backward
            and spec.mask == "none"
            and spec.H > spec.H_KV
            and spec.s_q <= 4
            and spec.s_kv >= 8192
        ),
        "decode: takes the heads of a group together; s_q 1, s_kv 16k, heads 8/2: 3.4 ms, "
        "cpu_flash 4.9; s_q 16, or s_kv 4k: hardly a difference",
    ),
    Rule(
        "cpu_flash",
        lambda spec: spec.device == "cpu",
        "s_q 1024, s_kv 4k: 46 ms and 120 back, blocked 64 and 150; a mask of all pairs: 62 and "
        "138, blocked 159 and 266; within a tenth of blocked at s_q up to 128",
    ),
    Rule("blocked", lambda _: True, "supports every block"),
)


def choose(spec: KernelSpec) -> str:
    """Return the name of the kernel for a block."""
    return next(
        rule.kernel
        for rule in RULES
        if rule.fits(spec) and KERNELS[rule.kernel].unsupported(spec) is None
    )

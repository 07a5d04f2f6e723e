"""Which kernel `kernel="auto"` takes: the first rule that fits, of kernels that can do the job.

The rule for the CPU rests on benchmarks/results/kernels-cpu.json (two cores; benchmarks/kernels.py
measures another machine); those for CUDA rest on PyTorch's source alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lvxattn.torch_impl.kernels import KERNELS, split
from lvxattn.torch_impl.kernels.kernel_spec import KernelSpec


@dataclass(frozen=True)
class Rule:
    """Take this kernel for jobs that fit, because."""

    kernel: str
    fits: Callable[[KernelSpec], bool]
    because: str


RULES = (
    Rule(
        "blocked",
        lambda job: job.device == "cuda" and job.additive and not job.backward,
        "only tiles give (top, total), and to look whether lse will do is to wait for the device",
    ),
    Rule(
        "cuda_flash",
        lambda job: job.device == "cuda",
        "the fastest for 16 bits in PyTorch's own order, splits by itself; not measured",
    ),
    Rule(
        "split",
        lambda job: (
            job.device == "cuda" and job.dtype != torch.float64 and split.parts_for(job) > 1
        ),
        "too few heads and rows to fill a GPU, and no kernel before splits by itself; not measured",
    ),
    Rule(
        "cudnn",
        lambda job: job.device == "cuda" and job.H != job.H_KV,
        "takes a bias and grouped heads as they are; not measured",
    ),
    Rule("efficient", lambda job: job.device == "cuda", "takes fp32 and a bias; not measured"),
    Rule(
        "cpu_flash",
        lambda job: job.device == "cpu",
        "s_q 1024, s_kv 4k: 46 ms and 120 back, blocked 64 and 150; a mask of all pairs: 62 and "
        "138, blocked 159 and 266; within a tenth of blocked at s_q up to 128",
    ),
    Rule("blocked", lambda _: True, "can do every job"),
)


def choose(job: KernelSpec) -> str:
    """Return the name of the kernel for a job."""
    return next(
        rule.kernel
        for rule in RULES
        if rule.fits(job) and KERNELS[rule.kernel].unsupported(job) is None
    )

"""A library of wrong kernels: common defects, each one overridden step of a correct kernel.

They prove that the cases catch such defects, and a failing kernel is diagnosed by comparison with
them.
"""

from lvxattn.check.wrong import backward, heads, masks, memory, precision, scores, sizes, sums
from lvxattn.check.wrong.kernel_base import KernelBase
from lvxattn.check.wrong.on_ranks import ON_RANKS, OnRanks

# In the order in which the modules define them: by name.
WRONG: dict[str, type[KernelBase]] = {
    kernel.name: kernel
    for module in (scores, sums, heads, sizes, masks, backward, precision, memory)
    for kernel in vars(module).values()
    if isinstance(kernel, type) and issubclass(kernel, KernelBase) and kernel.name
}
# All of them, of one process and distributed.
KERNELS: dict[str, type[KernelBase] | type[OnRanks]] = {**WRONG, **ON_RANKS}

__all__ = ["KERNELS", "ON_RANKS", "WRONG", "KernelBase", "OnRanks"]

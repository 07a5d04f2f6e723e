"""The kernels behind `block_attention`: to add one, write its file and name it here.

Each offers `NAME`, `unsupported(job)`, `forward` and `backward`, as `job.Kernel` says.  `choose`
holds the rules by which `kernel="auto"` picks one.
"""

from lvxattn.torch_impl.kernels import blocked, cpu_flash, cuda_flash, cudnn, efficient, split
from lvxattn.torch_impl.kernels.kernel_spec import Kernel, KernelSpec

__all__ = ["KERNELS", "Kernel", "KernelSpec"]

_ALL: tuple[Kernel, ...] = (blocked, cpu_flash, cuda_flash, cudnn, efficient, split)
KERNELS: dict[str, Kernel] = {kernel.NAME: kernel for kernel in _ALL}

"""The kernels of `block_attention`.  To add one, write its module and add it to `_ALL`.

Each module has `NAME`, `unsupported`, `forward` and `backward`, as in `kernel_spec.Kernel`.
`choose` contains the rules of `kernel="auto"`.
"""

from lvxattn.torch_impl.kernels import blocked, cpu_flash, cuda_flash, cudnn, efficient, split
from lvxattn.torch_impl.kernels.kernel_spec import Kernel, KernelSpec

__all__ = ["KERNELS", "Kernel", "KernelSpec"]

_ALL: tuple[Kernel, ...] = (blocked, cpu_flash, cuda_flash, cudnn, efficient, split)
KERNELS: dict[str, Kernel] = {kernel.NAME: kernel for kernel in _ALL}

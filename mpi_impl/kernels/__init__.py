"""Attention of one block in CUDA C++, for CuPy arrays.

`attention.cu` contains the kernels, `build` their tiles and the compiler's options, `cuda` the
launches, `choose` the choice between them and the tiles of `block_attention`.  They support fp32,
fp16 and bf16 with D = D_V of 64 or 128 and no mask.

The kernels compile for sm_80 and sm_90, and every thread of them has been run in emulation on a
CPU, and compared with the reference.  They have not been run on a GPU yet, nor been timed.
"""

from lvxattn.mpi_impl.kernels.choose import Choice, choose, wish
from lvxattn.mpi_impl.kernels.cuda import backward, forward

__all__ = ["Choice", "backward", "choose", "forward", "wish"]

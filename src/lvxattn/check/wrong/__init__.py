"""A library of wrong kernels: what people get wrong, each by overriding one step of a right one.

They prove that the cases catch such defects, and they tell a user whose kernel fails what it
behaves like.
"""

from lvxattn.check.wrong.backward import BACKWARD
from lvxattn.check.wrong.heads import HEADS
from lvxattn.check.wrong.kernel_base import KernelBase
from lvxattn.check.wrong.masks import MASKS
from lvxattn.check.wrong.memory import MEMORY
from lvxattn.check.wrong.precision import PRECISION
from lvxattn.check.wrong.scores import SCORES
from lvxattn.check.wrong.sums import SUMS

WRONG: dict[str, type[KernelBase]] = {
    **SCORES,
    **SUMS,
    **HEADS,
    **MASKS,
    **BACKWARD,
    **PRECISION,
    **MEMORY,
}

__all__ = ["WRONG", "KernelBase"]

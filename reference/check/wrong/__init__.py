"""A library of wrong kernels: what people get wrong, each by overriding one step of a right one.

They prove that the cases catch such defects, and they tell a user whose kernel fails what it
behaves like.
"""

from lvxattn.reference.check.wrong.backward import BACKWARD
from lvxattn.reference.check.wrong.heads import HEADS
from lvxattn.reference.check.wrong.masks import MASKS
from lvxattn.reference.check.wrong.memory import MEMORY
from lvxattn.reference.check.wrong.precision import PRECISION
from lvxattn.reference.check.wrong.right import Right
from lvxattn.reference.check.wrong.scores import SCORES
from lvxattn.reference.check.wrong.sums import SUMS

WRONG: dict[str, type[Right]] = {
    **SCORES,
    **SUMS,
    **HEADS,
    **MASKS,
    **BACKWARD,
    **PRECISION,
    **MEMORY,
}

__all__ = ["WRONG", "Right"]

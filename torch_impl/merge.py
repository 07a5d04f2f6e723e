r"""placeholder"""

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    return torch.exp(lse_a - base)[..., None] * out_a + torch.exp(lse_b - base)[
        ..., None
    ] * out_b, lse

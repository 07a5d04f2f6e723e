"""Attend under torchrun with a mask that raises on rank 1: torchrun is to end rank 0.

The group's timeout is PyTorch's own, half an hour.
"""

from typing import Any

import torch

from lvxattn.torch_impl import Layout, cross_attention
from lvxattn.torch_impl.commands.processes import world


def rule(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
    """Be a user's mask."""
    if group.rank == 1 and asked:
        raise ZeroDivisionError("of the user's own")
    return kv_index <= q_index


asked = False  # as all ranks agree, where each would hear of it
with world() as group:
    q, k, v = torch.ones(3, 1, 2, 5, 8)
    layout = Layout.agree(q, k, v, group, mask=rule)
    asked = True
    cross_attention(q, k, v, group, mask=rule, layout=layout)

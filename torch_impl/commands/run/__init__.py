"""What differs in kind in ``python -m lvxattn.torch_impl run``: its ranks, tensors and devices.

===========  ====================================================================================
`processes`  the process group, its threads and its devices; for every command
`ranks`      the ranks of a run
`backend`    where a rank computes, and how
===========  ====================================================================================

The rest is `lvxattn.cli`.
"""

from lvxattn.torch_impl.commands.run.processes import (
    check_environment,
    choose_device,
    limit_threads,
    world,
)
from lvxattn.torch_impl.commands.run.ranks import TorchRanks

__all__ = ["TorchRanks", "check_environment", "choose_device", "limit_threads", "world"]

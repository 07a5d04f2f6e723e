"""What differs in kind in ``python -m lvxattn.torch_impl run``: its ranks, tensors and devices.

===========  ====================================================================================
`world`      the process group, its threads and its devices; for every command
`ranks`      the ranks of a run
`backend`    where a rank computes, and how
===========  ====================================================================================

The rest is `lvxattn.reference.run`.
"""

from lvxattn.torch_impl.run.ranks import TorchRanks
from lvxattn.torch_impl.run.world import check_environment, choose_device, limit_threads, world

__all__ = ["TorchRanks", "check_environment", "choose_device", "limit_threads", "world"]

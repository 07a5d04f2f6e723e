"""Run ``python -m lvxattn.torch_impl`` with a rank 0 that takes seconds to say what is wrong.

torchrun ends all ranks when the first has ended with another status than 0; rank 0 is to have
spoken by then, however slow it is.
"""

import runpy
import time

import lvxattn.cli as shared

refuse = shared.refuse


def slowly(message: str, rank: int) -> int:
    """Refuse after 4 seconds, on rank 0; the other rank takes up to 2 to end."""
    if rank == 0:
        time.sleep(4)
    return refuse(message, rank)


shared.refuse = slowly
runpy.run_module("lvxattn.torch_impl", run_name="__main__")

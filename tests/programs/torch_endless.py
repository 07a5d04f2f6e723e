"""Exchange objects for ever, as a command of torch_impl does; with "stop", rank 1 stops itself."""

import os
import signal
import sys

from lvxattn.torch_impl.commands.processes import world

with world() as group:
    # One write: torchrun's streams are unbuffered, and print writes its end of line by another.
    print(f"{group.rank} {os.getpid()}\n", end="", flush=True)
    group.allgather(None)
    if "stop" in sys.argv and group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        group.allgather(None)

"""A process group's number of threads, and its timeout, which ends a wait.

usage: torch_world.py FILE; LVXATTN_TIMEOUT is set.  Rank 1 leaves rank 0 waiting, which writes the
file at its timeout.
"""

import json
import os
import sys
import time
from pathlib import Path

from lvxattn.torch_impl.commands.processes import limit_threads, world

os.sched_getaffinity = lambda _: set(range(8))
done = Path(sys.argv[1])

with world() as group:
    threads = limit_threads(group)
    start = time.monotonic()
    if group.rank == 1:
        while not done.exists() and time.monotonic() < start + 60:
            time.sleep(0.01)
        os._exit(0)
    try:
        group.allgather(None)
        said = ""
    except RuntimeError as error:
        said = str(error)
    report = {"threads": threads, "waited": time.monotonic() - start, "said": said}
    json.dump(report, sys.stdout, indent=None)
    sys.stdout.flush()
    done.touch()
    os._exit(0)  # nobody is there to end the group with

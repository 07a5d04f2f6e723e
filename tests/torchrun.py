"""Start programs under torchrun, in time, and leave no process behind."""

import sys
from pathlib import Path

from tests.launch import Ended, launch

# What torchrun sets for its ranks: a launcher within a launcher must not inherit any of it.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OUTSIDE: dict[str, str | None] = dict.fromkeys(_OF_A_RANK)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(
    P: int,
    *args: str | Path,
    timeout: float = 250.0,
    env: dict[str, str | None] | None = None,
) -> Ended:
    """Run ``torchrun --standalone --nproc-per-node P *args``; kill it if it outlives `timeout`.

    A launch on 2 ranks takes about 6 s of processor time, most of it to import torch in every
    process.  torchrun's own exit status is 0 or 1, and if it is 1, stderr has its report.

    Parameters
    ----------
    P : int
    *args
        ``"-m", "module", ...`` or a file, and its arguments.
    timeout : float
        Seconds.
    env : dict, optional
        Added to the environment; None takes a variable out of it.  OMP_NUM_THREADS is 1 otherwise.
    """
    command = [*TORCHRUN, "--nproc-per-node", str(P), *map(str, args)]
    return launch(command, timeout=timeout, env={**OUTSIDE, **(env or {})})

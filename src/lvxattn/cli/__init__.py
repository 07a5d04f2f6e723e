"""The command lines: what the commands ``run``, ``measure`` and ``plan`` share.

==================  ============================================================================
`run`               the command ``run``, top-down: read, compute, write, check, report
`run_options`       its arguments
`run_ranks`         what an implementation provides: communication, and arrays on a device
`run_problem`       the tensors, read from a file or random, and each rank's share of them
`run_check`         compare sampled rows with an independent softmax (`two_pass`), to within
                    derived limits (`rounding`)
`run_report`        the table and the JSON document
`run_trace`         timelines and clocks of all ranks
`measure`, `plan`   the other commands
`doctor`            what ranks, hosts and the network between them are, and what is wrong
`arguments`         parsers of all commands
`tensors`           safetensors files, read and written slice by slice
==================  ============================================================================

They work on NumPy arrays and on any object with rank, size and allgather; no algorithm file imports
them.
"""

from lvxattn.cli.arguments import UsageError, refuse
from lvxattn.cli.run import run_command
from lvxattn.cli.run_ranks import Backend, Ranks
from lvxattn.cli.tensors import InputError

__all__ = [
    "Backend",
    "InputError",
    "Ranks",
    "UsageError",
    "refuse",
    "run_command",
]

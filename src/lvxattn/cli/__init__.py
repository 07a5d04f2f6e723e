"""Cross-attention from the command line: what the commands ``run`` have in common.

===========  ====================================================================================
`command`    the command: its exit status, and what is said of an error
`program`    the program, top-down: read, compute, write, check, report
`ranks`      what differs in kind: who talks to whom, and with what arrays they compute
`options`    its arguments
`arguments`  what the arguments of all commands share
`problem`    what is computed: a file's tensors or random ones, and each rank's share of them
`tensors`    safetensors files, read and written slice by slice
`check`      is the result right?
`two_pass`   what it is compared with
`rounding`   how far off it may be
`report`     the text and the JSON
`clocks`     every rank's clock, compared with rank 0's, for a trace
`tracing`    what a trace needs of a run, and where it goes
===========  ====================================================================================

It works on NumPy arrays and on whatever has rank, size and allgather; no algorithm file imports it.
"""

from lvxattn.cli.arguments import UsageError
from lvxattn.cli.command import refuse, run_command
from lvxattn.cli.program import run_problem
from lvxattn.cli.ranks import Backend, Ranks
from lvxattn.cli.tensors import InputError

__all__ = [
    "Backend",
    "InputError",
    "Ranks",
    "UsageError",
    "refuse",
    "run_command",
    "run_problem",
]

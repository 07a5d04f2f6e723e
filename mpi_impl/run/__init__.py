"""Cross-attention from the command line: what ``python -m lvxattn.mpi_impl run`` does.

===========  ====================================================================================
`program`    the program, top-down: read, compute, write, check, report
`options`    its arguments
`problem`    what is computed: a file's tensors or random ones, and each rank's share of them
`tensors`    safetensors files, read and written slice by slice
`backend`    NumPy or CuPy
`check`      is the result right?
`two_pass`   what it is compared with
`report`     the text and the JSON
===========  ====================================================================================
"""

from lvxattn.mpi_impl.run.program import run_problem
from lvxattn.mpi_impl.run.tensors import InputError

__all__ = ["InputError", "run_problem"]

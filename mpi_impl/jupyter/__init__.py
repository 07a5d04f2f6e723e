"""MPI ranks in a notebook: a cell that begins with ``%%mpi 4`` runs on four ranks.

    %load_ext lvxattn.mpi_impl.jupyter

    %%mpi 4 --give total
    from mpi4py import MPI
    comm = MPI.COMM_WORLD
    print("I am one of", comm.size)
    total = comm.allreduce(comm.rank)

============  ============================================================================
`magic`       ``%%mpi``: its arguments, output and errors
`launch`      starts the ranks, waits for them, and ends all of their processes
`guard`       runs beside each rank: records how it ends, ends it if the notebook is gone
`rank`        the program of a rank: the cell, with its own output and errors
`cell_files`  variables, output, places and failures of ranks, exchanged in files
============  ============================================================================

Every cell starts new processes; only what it gives to the notebook outlives it.
"""

from typing import Any

from lvxattn.mpi_impl.jupyter.cell_files import CellError
from lvxattn.mpi_impl.jupyter.launch import run_cell

__all__ = ["CellError", "load_ipython_extension", "run_cell"]


def load_ipython_extension(shell: Any) -> None:
    """Register the magic; ``%load_ext`` calls this.

    Parameters
    ----------
    shell : IPython.core.interactiveshell.InteractiveShell
    """
    from lvxattn.mpi_impl.jupyter.magic import mpi  # here, as only notebooks have IPython

    shell.register_magic_function(mpi, "cell", "mpi")

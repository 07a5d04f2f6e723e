"""Real MPI ranks from a notebook: a cell that begins with ``%%mpi 4`` runs on four of them.

    %load_ext lvxattn.mpi_impl.jupyter

    %%mpi 4 --give total
    from mpi4py import MPI
    comm = MPI.COMM_WORLD
    print("I am one of", comm.size)
    total = comm.allreduce(comm.rank)

===========  ======================================================================
`magic`      ``%%mpi``: its arguments, what it prints, what it raises
`launch`     starts the ranks, waits for them, and leaves none behind
`guard`      stands beside each rank: notes how it ends, ends it if the notebook is gone
`rank`       what each of them runs: the cell, with its output and its errors kept apart
`variables`  on their way to the ranks and back
`report`     what is said of the ranks: what they printed, where they are, why they failed
===========  ======================================================================

Every cell starts new processes: nothing of one is left for the next but what it gives to the
notebook.
"""

from typing import Any

from lvxattn.mpi_impl.jupyter.launch import run_cell
from lvxattn.mpi_impl.jupyter.report import CellError

__all__ = ["CellError", "load_ipython_extension", "run_cell"]


def load_ipython_extension(shell: Any) -> None:
    """Give a notebook the magic; ``%load_ext`` calls this.

    Parameters
    ----------
    shell : IPython.core.interactiveshell.InteractiveShell
    """
    from lvxattn.mpi_impl.jupyter.magic import mpi  # IPython is there where a notebook is

    shell.register_magic_function(mpi, "cell", "mpi")

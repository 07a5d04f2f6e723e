"""What differs in kind in ``python -m lvxattn.mpi_impl run``: its ranks, NumPy and CuPy.

The rest is `lvxattn.cli`.
"""

from lvxattn.mpi_impl.commands.run.ranks import MPIRanks

__all__ = ["MPIRanks"]

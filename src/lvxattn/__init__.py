"""Exact distributed cross-attention for long visual inputs (LV-XAttn, arXiv:2502.02406).

`lvxattn.reference` is the algorithm in NumPy, every rank a thread of one process;
`lvxattn.mpi_impl` is the same over mpi4py. Nothing is imported here, so that
``import lvxattn`` needs no MPI.
"""

__version__ = "0.1.0.dev0"

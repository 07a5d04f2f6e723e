"""The commands of ``python -m mpi4py -m lvxattn.mpi_impl``."""

"""``python -m lvxattn.mpi_impl doctor``: check that a cluster is fit for a run.

==============  ==========================================================================
`examination`   the program, top-down: examine, find problems, print
`rank_info`     each rank's environment, and messages really sent
==============  ==========================================================================
"""

from lvxattn.mpi_impl.commands.doctor.examination import examine

__all__ = ["examine"]

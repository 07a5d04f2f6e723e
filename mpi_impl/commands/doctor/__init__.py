"""Is this cluster fit for a run?  What ``python -m lvxattn.mpi_impl doctor`` does.

==============  =================================================================================
`examination`   the program, top-down: look, send messages round, judge, print
`facts`         what a rank knows of itself
`ring`          messages really sent
`advice`        what is wrong, and what to do about it
==============  =================================================================================
"""

from lvxattn.mpi_impl.commands.doctor.examination import examine

__all__ = ["examine"]

"""Report which rank raised an exception or was killed.

An exception gets a note of its rank.  A rank that is killed, as when memory runs out, cannot report
it, and launchers name a process at best.  So a shell runs beside each rank and reads a pipe: a rank
that exits normally writes a word to it; if the pipe closes without one, the shell prints a message.
"""

import atexit
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

# The script of the shell; $1 is the message.
WATCH = r'read -r word || printf "%s\n" "$1" >&2'


@contextmanager
def named(comm: MPI.Intracomm) -> Iterator[None]:
    """Add a note of this rank of `comm` to any exception."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"raised on rank {comm.rank} of {comm.size}")
        raise


def announce_death(comm: MPI.Intracomm) -> None:
    """Report on stderr which rank of `comm` this was if it is killed or crashes.

    Not collective; call it once in a program.  Where the launcher ends the other ranks but not
    their shells, these report too: the first line names the cause.

    Parameters
    ----------
    comm : MPI.Intracomm
        Numbers the ranks.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from lvxattn.mpi_impl import announce_death
    >>> announce_death(MPI.COMM_WORLD)  # doctest: +SKIP
    """
    name = MPI.Get_processor_name()
    text = f"rank {comm.rank} of {comm.size} (process {os.getpid()} on {name}) died"
    shell = subprocess.Popen(
        ["/bin/sh", "-c", WATCH, "sh", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=_launcher_socket(),
    )
    atexit.register(shell.communicate, b"ends as it should\n")


def _launcher_socket() -> list[int]:
    """Return the socket whose closing tells Hydra, MPICH's launcher, that a rank has ended, if any.

    Hydra kills all ranks at once and may not wait for their output.  As the shell holds this socket
    too, Hydra notices a death only after the shell has printed its message.
    """
    try:
        socket = int(os.environ["PMI_FD"])
        os.fstat(socket)
    except (KeyError, ValueError, OSError):
        return []
    return [socket]

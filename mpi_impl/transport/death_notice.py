"""Say which rank ended, so that the user need not guess.

An exception is given a note of its rank.  A rank that is killed, as when memory runs out, names
nobody, and launchers tell a process at best.  So a small shell waits beside each rank for a word
that a rank which ends as it should sends it; when the pipe closes without that word, the shell
speaks.
"""

import atexit
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

# What the shell runs: $1 is the text.
WATCH = r'read -r word || printf "%s\n" "$1" >&2'


@contextmanager
def named(comm: MPI.Intracomm) -> Iterator[None]:
    """Add a note of this rank of `comm` to whatever is raised: it will end the others too."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"raised on rank {comm.rank} of {comm.size}")
        raise


def announce_death(comm: MPI.Intracomm) -> None:
    """Have it said on stderr which rank of `comm` this was, should it be killed or crash.

    Not collective, and wanted once in a program.  Where the launcher then ends the other ranks but
    spares their shells, these speak too: the first line names the cause.

    Parameters
    ----------
    comm : MPI.Intracomm
        Whose numbers name the ranks.
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
    """Return the socket by whose end Hydra, MPICH's launcher, learns of a rank's end, if any.

    Hydra kills all ranks at once and may not wait for what they print.  While the shell holds this
    socket too, Hydra learns of a death when the shell has spoken.
    """
    try:
        socket = int(os.environ["PMI_FD"])
        os.fstat(socket)
    except (KeyError, ValueError, OSError):
        return []
    return [socket]

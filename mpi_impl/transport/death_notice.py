"""Report which rank raised an exception or was killed.

An exception gets a note of its rank.  A rank that is killed, as when memory runs out, cannot report
it, and launchers name a process at best.  So a shell runs beside each rank and reads a pipe: a rank
that exits normally writes a word to it; if the pipe closes without one, the shell prints a message.

A killed rank may also make MPI fail on a rank that exchanges messages with it.  That one is not the
cause: its exception says what it was waiting for, and comes after the cause has been reported.
"""

import atexit
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mpi4py import MPI

VARIABLE = "LVXATTN_DEATH_NOTICE"
"""The environment variable that, if 0, leaves all deaths unreported."""
GRACE = 2.0
"""Seconds from MPI's failure to its exception: a launcher ends all ranks sooner."""
# The script of the shell; $1 is the message, $2 the process, $3 the least status to abort at;
# stdout is the launcher's socket, if any.
WATCH = r"""
read -r word && exit
{ read -r stat </proc/"$2"/stat; } 2>/dev/null
printf '%s\n' "$1" >&2
status=${stat##* }  # as waitpid(2) has it: 256 times that of an exit, or a signal
[ -n "$status" ] || status=$((256 * 9))  # the launcher has been faster
[ "$status" -lt "$3" ] && exit
[ "$status" -lt 256 ] && code=$((128 + status % 128)) || code=$((status / 256))
echo "cmd=abort exitcode=$code"
"""
# The shell that watches this process, if there is one; None where it could not be started.
_shells: "list[subprocess.Popen[bytes] | None]" = []


@contextmanager
def named(comm: MPI.Intracomm) -> Iterator[None]:
    """Add a note of this rank of `comm` to any exception; delay those of MPI."""
    rank = f"rank {comm.rank} of {comm.size}"
    try:
        yield
    except MPI.Exception as error:
        time.sleep(GRACE)
        error.add_note(f"noticed on {rank}, which need not be the cause")
        raise
    except BaseException as error:
        error.add_note(f"raised on {rank}")
        raise


def announce_death(comm: MPI.Intracomm) -> None:
    """Report on stderr which rank of `comm` this was if it is killed or crashes.

    Not collective.  Calls after the first have no effect.  Under Hydra, the launcher of MPICH, a
    pass calls this with ``MPI.COMM_WORLD``; a program calls it at its beginning to have a rank
    named that is killed before its first pass, or under another launcher.  Where that ends the
    other ranks but not their shells, these report too: the first line names the cause.

    With ``LVXATTN_DEATH_NOTICE=0`` in the environment nothing is reported, nor where no process
    can be started.

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
    if _shells or os.environ.get(VARIABLE) == "0":
        return
    name = MPI.Get_processor_name()
    text = f"rank {comm.rank} of {comm.size} (process {os.getpid()} on {name}) died"
    shell = None
    # Hydra ends all ranks by itself when a signal has ended one, and Slurm does not.
    least = "1" if _of_slurm() else "256"
    with suppress(OSError):
        shell = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "sh", text, str(os.getpid()), least],
            stdin=subprocess.PIPE,
            stdout=_pmi_socket() or subprocess.DEVNULL,
        )
    _shells.append(shell)
    if shell is None:
        return
    atexit.register(end_unannounced)
    os.register_at_fork(after_in_child=_forget)


def announce_under_hydra() -> None:
    """Call `announce_death` where no other rank's shell would report, too."""
    if not _shells and not _of_slurm() and _pmi_socket():
        announce_death(MPI.COMM_WORLD)


def end_unannounced() -> None:
    """Let this process end without a report."""
    while _shells:
        shell = _shells.pop()
        if shell is not None:
            shell.communicate(b"ends as it should\n")


def _pmi_socket() -> int:
    """Return the socket over which a rank of MPICH talks to its launcher, or 0.

    Of Hydra, MPICH's own: when it closes Hydra kills all ranks, and may not wait for their output.
    As the shell holds it too, Hydra notices a death only after the shell has printed its message.
    If the process has exited by itself, Hydra sometimes takes that for its proper end: so the shell
    asks it, in the protocol of ranks (PMI-1), to abort.

    Of Slurm (``srun --mpi=pmi2``), which understands PMI-1 too: it lets the other ranks wait for a
    dead one, unless the shell asks it to abort.
    """
    try:
        socket = int(os.environ["PMI_FD"])
        os.fstat(socket)
    except (KeyError, ValueError, OSError):
        return 0
    return socket


def _of_slurm() -> bool:
    """Return whether the launcher of an MPICH is Slurm."""
    return "PMI_JOBID" in os.environ


def _forget() -> None:
    """Close a forked child's end of the pipe: the rank, not its child, is watched."""
    for shell in _shells:
        if shell is not None and shell.stdin is not None:
            shell.stdin.close()
    _shells.clear()

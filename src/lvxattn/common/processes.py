"""The processes beside a rank: which ranks of its host are stopped, and the one that started it.

A stopped process (SIGSTOP) reports nothing, and its neighbours only know that they wait.  But the
ranks of a host are children of one launcher, and ``/proc`` has the state and the environment of
each.  Where there is no ``/proc``, or a shell between the launcher and its ranks, none is found.
"""

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

from lvxattn.common.launcher import claim

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <sys/prctl.h>


def stopped_ranks(*same: str) -> dict[int, int]:
    """Return the process ids of the stopped ranks on this host, by their rank in the world.

    Parameters
    ----------
    *same : str
        Environment variables of this process: only ranks that have the same there are returned.
    """
    parent, found = str(os.getppid()), {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended, or belongs to another user
            # The name, in brackets, may hold anything.
            if path.read_text(errors="replace").rpartition(")")[2].split()[:2] != ["T", parent]:
                continue
            lines = path.with_name("environ").read_bytes().decode(errors="replace").split("\0")
            theirs = dict(line.split("=", 1) for line in lines if "=" in line)
            said = claim(theirs)
            if said is not None and all(theirs.get(name) == os.environ[name] for name in same):
                found[said.rank] = int(path.parent.name)
    return found


def stopped() -> str:
    """Return a sentence about the stopped ranks on this host; empty if there is none."""
    ranks = sorted(stopped_ranks().items())
    return "; ".join(f"rank {n} of the world (process {pid}) is stopped" for n, pid in ranks)


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal when the process that started it ends; on Linux only.

    Parameters
    ----------
    parent : int
        That process.
    number : int
        The signal.
    """
    with suppress(AttributeError, OSError):  # another operating system
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it ended before that
            os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of what this process's children leave behind; on Linux only."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """Return the process ids of this process's children, ended ones too."""
    parent, found = str(os.getpid()), set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if path.read_text(errors="replace").rpartition(")")[2].split()[1] == parent:
                found.add(int(path.parent.name))
    return found

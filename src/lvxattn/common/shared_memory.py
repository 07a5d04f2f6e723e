"""The files that MPICH's ranks of a host share memory through: ``/dev/shm/mpich_shm_JOB_HOST``.

Rank 0 of a host removes its file as MPI finalizes.  A run that ends badly leaves it: memory that
nobody uses.  Other MPI libraries have no such files.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")


def unlink_own_file(process: int | None = None) -> None:
    """Remove the name of this job's file: its memory then lasts as long as the ranks that map it.

    Not collective.  To be called once MPI is initialized: all ranks have opened the file by then.

    Parameters
    ----------
    process : int, optional
        A rank's (default: this one).
    """
    for path in _mapped(str(process or "self")):
        path.unlink(missing_ok=True)


def unmapped_files() -> list[Path]:
    """Return this user's files of MPICH that no process maps, oldest first.  Not collective."""
    found = {}
    for path in FOLDER.glob("mpich_*"):
        with suppress(OSError):  # it has just been removed
            if (it := path.stat()).st_uid == os.getuid():
                found[path] = it.st_mtime_ns
    if found:
        for process in Path("/proc").glob("[0-9]*"):
            for path in _mapped(process.name):
                found.pop(path, None)
    return sorted(found, key=lambda path: found[path])


def _mapped(process: str) -> set[Path]:
    """Return the files of MPICH that a process maps."""
    try:
        maps = Path("/proc", process, "maps").read_text(errors="replace")
    except OSError:  # it has ended, or belongs to another user, or there is no /proc
        return set()
    return {
        Path(name)
        for name in re.findall(rf" ({re.escape(str(FOLDER))}/mpich_\S+)$", maps, re.MULTILINE)
    }

"""Write results so that none are lost: atomically, and complete results replaced by such only.

gpu-DEVICE.unfinished-HOST-PID.json, .md     during the run; they stay if it is interrupted
gpu-DEVICE.json, .md                         replace them when the run is complete
"""

import os
import socket
from pathlib import Path
from tempfile import NamedTemporaryFile

# Bytes that a folder of results must have room for: more than a run writes.
ROOM = 2**20


def write(file: Path, text: str) -> None:
    """Write a file atomically."""
    with NamedTemporaryFile("w", dir=file.parent, prefix=".writing-", delete=False) as new:
        try:
            new.write(text)
            new.flush()
            os.fchmod(new.fileno(), 0o644)
            os.replace(new.name, file)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


def folder(name: str | Path) -> Path:
    """Return a writable folder, made if missing.

    Raises
    ------
    ValueError
        It cannot be made or written to.
    """
    found = Path(name).expanduser()
    trial = found / f".writing-{os.getpid()}"
    try:
        found.mkdir(parents=True, exist_ok=True)
        write(trial, "x" * ROOM)
        trial.unlink()
    except OSError as error:
        raise ValueError(f"expected a folder with room for results, got {found}: {error}") from None
    return found


class Results:
    """The files of one run.

    Parameters
    ----------
    folder : Path
    name : str
        ``"gpu-DEVICE"``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.complete = folder / name
        self.unfinished = folder / f"{name}.unfinished-{socket.gethostname()}-{os.getpid()}"

    def save(self, texts: dict[str, str], *, complete: bool) -> str:
        """Write files, named by their endings, and return their paths; may raise OSError."""
        stem = self.complete if complete else self.unfinished
        files = [Path(f"{stem}{ending}") for ending in texts]
        for file, text in zip(files, texts.values(), strict=True):
            write(file, text)
        if complete:
            for ending in texts:
                Path(f"{self.unfinished}{ending}").unlink(missing_ok=True)
        return ", ".join(map(str, files))

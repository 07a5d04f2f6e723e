"""A virtual environment for each set of pinned packages, kept in a folder.

An environment is made once. What it was made of is written into it last, so that one whose
installation failed or was interrupted is made anew.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.scoreboard.entries import Entry
from benchmarks.scoreboard.processes import run

ROOT = Path(__file__).parents[2]
_SECONDS = 1800  # to install one environment


class NotInstallableError(Exception):
    """The installer's own words."""


def python_of(entry: Entry, cache: Path) -> Path:
    """Return the interpreter of an entry's environment, which is made if necessary.

    Raises
    ------
    NotInstallableError
        With the installer's last words.
    """
    folder = cache / "environments" / entry.environment
    python, made = folder / "bin" / "python", folder / "made-of.json"
    wanted = json.dumps([sys.version, entry.requires])
    if made.exists() and made.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"  installing {' '.join(entry.requires)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = run([*pip, "install", "--quiet", *entry.requires], os.environ | _NO_BUILDS, _SECONDS)
    if done.status != 0:
        raise NotInstallableError(last_words(done.output))
    # The oracle, which needs NumPy alone, and the adapters: from this checkout, as it is now.
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "scoreboard.pth").write_text(f"{ROOT / 'src'}\n{ROOT}\n")
    made.write_text(wanted)
    return python


# DeepSpeed would compile its CUDA kernels.
_NO_BUILDS = {"DS_BUILD_OPS": "0", "PIP_NO_INPUT": "1"}


def last_words(output: str) -> str:
    """Return the line of a process's output that says why it ended."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("ERROR")]
    errors = [line for line in errors if "ChildFailedError" not in line]  # torchrun's, of a rank
    signals = [line for line in lines if " received by PID " in line]  # torchrun's; the cause last
    return (errors or signals or lines or ["it said nothing"])[-1][:300]

"""Run the check on an entry, in the entry's environment."""

import json
import os
import shlex
import tempfile
from pathlib import Path

from benchmarks.scoreboard.entries import Entry
from benchmarks.scoreboard.environments import (
    ROOT,
    NotInstallableError,
    last_words,
    python_of,
)
from benchmarks.scoreboard.outcome import ABSENT, SILENT, Outcome, of_report, without_report
from benchmarks.scoreboard.processes import run

# What a launcher or a user's own settings would change.
_NOT_INHERITED = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def command_of(entry: Entry, ranks: int, python: Path, suite: str) -> list[str]:
    """Return the command that checks an entry."""
    launcher = []
    if ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--framework", entry.framework, "--suite", suite, *entry.options]
    distributed = ["--distributed"] if ranks else []
    if entry.cuts:
        distributed += ["--cuts", ",".join(entry.cuts)]
    return [
        *(str(python), *launcher, "-m", "lvxattn.check", entry.target),
        *(*options, *distributed),
    ]


def checked(
    entry: Entry,
    ranks: int,
    *,
    suite: str,
    cache: Path,
    seconds: float,
    python: Path | None = None,
) -> tuple[Outcome, str]:
    """Run an entry on some ranks.

    Parameters
    ----------
    entry : Entry
    ranks : int
        0: in one process.
    suite : str
    cache : Path
        Folder of environments.
    seconds : float
        After which the check is ended.
    python : Path, optional
        Interpreter instead of that of the entry's environment.

    Returns
    -------
    (Outcome, str)
        And what was run and printed.
    """
    try:
        python = python or python_of(entry, cache)
    except NotInstallableError as error:
        return without_report(entry, ranks, suite, ABSENT, str(error)), str(error)
    environ = {name: x for name, x in os.environ.items() if name not in _NOT_INHERITED}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    environ |= dict(entry.variables)
    command = command_of(entry, ranks, python, suite)
    shown = shlex.join([*(f"{name}={x}" for name, x in entry.variables), *command])
    with tempfile.TemporaryDirectory(prefix="scoreboard-") as folder:
        path = Path(folder) / "report.json"
        done = run([*command, "--json", str(path)], environ, seconds)
        output = f"{shown}\n{done.output}"
        if path.exists():
            return of_report(entry, ranks, json.loads(path.read_text())), output
    why = f"ended after {seconds:g} s" if done.status is None else last_words(done.output)
    return without_report(entry, ranks, suite, SILENT, why), output

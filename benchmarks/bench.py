"""Arguments, timing and result files for the benchmarks."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from netlab.lab import LabError, find_mpiexec

from lvxattn.cli.arguments import writable
from lvxattn.common.new_file import write_file
from lvxattn.draw.picture import save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = dict[str, Any]
T = TypeVar("T")


FILES: dict[str, dict[str, Any]] = {
    "json": {"metavar": "FILE", "type": writable},
    "store": {"metavar": "DIR", "type": Path},
    "plot": {"metavar": "FILE", "type": Path},
}
"""Options that name the files to write: results as JSON, with a report in Markdown, a picture."""


def parser_for(doc: str | None, quick: str, *files: str) -> argparse.ArgumentParser:
    """Return a parser for a benchmark with this docstring.

    Parameters
    ----------
    doc : str
    quick : str
        What ``--quick`` measures.
    *files : str
        Names of `FILES`.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    for name in files:
        parser.add_argument(f"--{name}", **FILES[name])
    return parser


def goal_of(quick: bool) -> str:
    """Return the words that follow a goal where the small version cannot meet it."""
    return " of the full version on a quiet machine" if quick else ""


def seconds(work: Callable[[], object]) -> float:
    """Return the duration of one call."""
    start = perf_counter()
    work()
    return perf_counter() - start


def take_turns(rounds: int, first: Callable[[], T], second: Callable[[], T]) -> list[tuple[T, T]]:
    """Return the results of calls in turn, one pair per round.

    The order alternates, so that what one leaves behind affects both alike.
    """
    pairs = []
    for number in range(rounds):
        if number % 2:
            a, b = first(), second()
        else:
            b, a = second(), first()
        pairs.append((a, b))
    return pairs


def describe() -> Results:
    """Return the machine's description, to be stored with every result."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
    }


def describe_run(quick: bool) -> Results:
    """Return the machine, the date, and whether this is the small version."""
    return {"machine": describe(), "date": date.today().isoformat(), "quick": quick}


def write_json(file: str | None, measured: Results) -> None:
    """Write results to a file, if one is named, with the machine first."""
    if file:
        write_file(file, json.dumps({"machine": describe(), **measured}, indent=1))


def publish(
    name: str,
    measured: Results,
    text: str,
    options: argparse.Namespace,
    draw: "Callable[[Results], Figure] | None" = None,
) -> None:
    """Print a report; write it, the results as JSON and the picture, where options name places."""
    print(text, end="")
    if options.store:
        options.store.mkdir(parents=True, exist_ok=True)
        write_file(options.store / f"{name}.json", json.dumps(measured) + "\n")
        write_file(options.store / f"{name}.md", text)
    if draw and options.plot:
        save_picture(draw(measured), options.plot, dpi=110)


def mpirun(
    P: int, command: list[str], env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command on ranks of this machine, which communicate over shared memory."""
    return subprocess.run(
        [*find_mpiexec(), "-n", str(P), *command], capture_output=True, text=True, check=False,
        env={**os.environ, **(env or {})},
    )  # fmt: skip


def printed_by(done: "subprocess.CompletedProcess[str]") -> str:
    """Return the output of ranks; raise RuntimeError if they failed."""
    if done.returncode:
        raise RuntimeError(f"the ranks ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@contextmanager
def exit_without_lab(name: str) -> Iterator[None]:
    """Exit with status 2 where no cluster can be built."""
    try:
        yield
    except LabError as reason:
        print(f"{name}: {reason}", file=sys.stderr)
        sys.exit(2)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()

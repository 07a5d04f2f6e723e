"""Test and measure on a GPU machine, in 9 minutes: what `make gpu` runs.

    python benchmarks/gpu [--out FOLDER] [--mpiexec "mpirun ..." | --cuda-mpi FILE] [--dry]

It first reports what the machine lacks, and then runs what it can: the tests marked `gpu`, both
command lines on ranks that share the device, and the benchmarks, whose results are judged.  Every
step has a time limit; the next ones run even if one fails or runs out of time.  Results are written
after every step (`store`), and to gpu-DEVICE.json and gpu-DEVICE.md at the end.

--dry needs no device: tests are collected, benchmarks rehearsed on tiny shapes, and the commands
shown.  It uses this Python's own packages and no network.

The exit status is 0 if all steps that ran succeeded; 1 if one failed, ran out of time or gave a
wrong result, or if results could not be written; 2 if nothing ran, for lack of a device, packages,
time or valid arguments; 128 plus the signal's number if it was interrupted.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from examine import ROOT, Machine, examine
from judge import WRONG, verdicts, wrong
from steps import ALL, CHECKS, NO_TIME, Step, perform, steps
from store import Results, folder
from table import page

CUT = "INTERRUPTED"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run, write, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python benchmarks/gpu"
    )
    parser.add_argument("--out", metavar="FOLDER", help="default: benchmarks/results")
    launcher = parser.add_mutually_exclusive_group()
    launcher.add_argument("--mpiexec", default="", metavar="COMMAND")
    launcher.add_argument("--cuda-mpi", default="", metavar="FILE", help="of build_cuda_mpi.sh")
    parser.add_argument(
        "--seconds", type=positive, default=ALL, help="for all steps together; default: %(default)g"
    )
    parser.add_argument("--dry", action="store_true", help="without a device")
    options = parser.parse_args()
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="lvxattn-gpu-") as scratch:
            results = ROOT / "benchmarks" / "results"
            try:
                out = folder(options.out or (scratch if options.dry else results))
                machine = examine(options.mpiexec, options.cuda_mpi, scratch)
            except ValueError as error:
                parser.error(str(error))
            say(*machine.lines())
            if not options.dry and {"torch", "cupy"} <= set(machine.missing):
                say("Neither PyTorch nor CuPy has a device: nothing to run. --dry rehearses.")
                return 2
            if out == Path(scratch):
                say("A rehearsal: its results are thrown away, unless --out (OUT=) is given.")
            end = start + options.seconds
            return Run(machine, Path(scratch), out, dry=options.dry).all(start, end)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0]
        say(f"\nInterrupted by {signal.Signals(number).name}: nothing is left running.")
        return 128 + int(number)


def positive(text: str) -> float:
    """Return a number of seconds."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0 seconds, got {text}")
    return number


def say(*lines: str) -> None:
    """Print lines at once; a run whose output is closed continues without it."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:  # as when Ctrl-C ended `tee` with us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interrupt(number: int, _: object) -> None:
    """End the run; the rest takes seconds, and is not interrupted."""
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


class Run:
    """The steps, their results so far, and where these are written.

    Parameters
    ----------
    machine : Machine
    scratch : Path
        Folder for the benchmarks' files.
    out : Path
        Folder for the results.
    dry : bool
        Whether this is a rehearsal.
    """

    def __init__(self, machine: Machine, scratch: Path, out: Path, *, dry: bool) -> None:
        self.machine, self.scratch, self.dry = machine, scratch, dry
        device = "rehearsal" if dry else machine.device
        self.results = Results(out, f"gpu-{device}")
        self.rows: dict[str, dict[str, Any]] = {}
        self.where, self.trouble = "nowhere", ""
        self.thrown_away = out == scratch
        self.stored: dict[str, Any] = {
            "device": device, "rehearsal": dry, "python": sys.version.split()[0],
            "found": machine.found, "missing": machine.missing,
            "steps": [], "parts": {}, "goals": [],
        }  # fmt: skip

    def all(self, start: float, end: float) -> int:
        """Run all steps between two times, print their outcomes, and return the exit status."""
        todo = steps(self.machine, self.scratch, dry=self.dry)
        share = start + (end - start) * CHECKS / ALL
        try:
            for step in todo:
                self.one(step, end if step.part else share)
            for step in todo:  # checks may use the time that the benchmarks leave
                if self.rows[step.name]["outcome"] == NO_TIME:
                    self.one(step, end)
        finally:
            outcomes = [row["outcome"] for row in self.rows.values()]
            complete = len(outcomes) == len(todo) and not {NO_TIME, CUT} & set(outcomes)
            self.print_end(self.save(complete=complete), complete=complete)
        if all(outcome.startswith(("not run", "shown")) for outcome in outcomes):
            return 2
        failed = any(outcome.startswith(("FAILED", "OUT")) for outcome in outcomes)
        return int(failed or bool(self.trouble))

    def one(self, step: Step, until: float) -> None:
        """Run a step, judge its measurements, and write the results so far."""
        say(f"\n{step.name}: {step.said()}")
        self.rows[step.name] = step.row(CUT)
        try:
            row = perform(step, self.machine, until - time.monotonic(), dry=self.dry)
        finally:  # measurements count, even if the step was ended
            bad = self.read(step) if step.part else []
        if bad:
            row |= {"outcome": WRONG, "last": bad[0], "output": "\n".join([row["output"], *bad])}
        self.rows[step.name] = row
        say(f"  {row['outcome']}, {row['seconds']} s  {row['last']}")
        if row["outcome"].startswith(("FAILED", "OUT")):
            say(*(f"  > {line}" for line in row["output"].splitlines()[-40:]))
        self.save(complete=False)
        if self.trouble:
            say(f"  {self.trouble}")

    def read(self, step: Step) -> list[str]:
        """Read a benchmark's measurements, complete or not, and return what is wrong."""
        file = self.scratch / f"{step.part}.json"
        if not file.is_file():
            return []
        try:
            self.stored["parts"][step.part] = json.loads(file.read_text())
            return wrong(step.part, self.stored["parts"][step.part])
        except Exception as error:  # one part's rows end nothing else
            return [f"its rows cannot be judged: {error!r}"]

    def save(self, *, complete: bool) -> str:
        """Write the results so far, and return the page; sets `trouble` if that fails."""
        self.stored["steps"] = list(self.rows.values())
        self.trouble = ""
        try:
            self.stored["goals"] = verdicts(self.stored)
            text = page(self.stored)
        except Exception as error:  # the numbers are kept without a page
            text = self.trouble = f"THE PAGE COULD NOT BE MADE: {error!r}\n"
        texts = {".json": json.dumps(self.stored, indent=1) + "\n", ".md": text}
        try:
            self.where = self.results.save(texts, complete=complete)
        except OSError as error:
            self.trouble = f"RESULTS COULD NOT BE WRITTEN: {error}"
        return text

    def print_end(self, text: str, *, complete: bool) -> None:
        """Print all outcomes, at the end of the output."""
        if self.trouble:
            say(f"\n{text}\n{self.trouble}")
        say("\nAll steps:")
        for row in self.rows.values():
            say(f"  {row['outcome']:24} {row['seconds']:6} s  {row['name']}  {row['last'][:90]}")
        say("\nGoals:")
        for goal in self.stored["goals"]:
            worst = "" if goal["worst"] is None else f" is {goal['worst']:.3g} ({goal['where']})"
            say(f"  {goal['verdict']:14} {goal['what']}{worst}; wanted {goal['wanted']}")
        if not complete:
            say(
                "\nNot every step was run to its end, so that these results replace no others.",
                "If it is time that they lack, --seconds gives more: make gpu ARGS='--seconds 900'",
            )
        say("\nResults: " + ("thrown away" if self.thrown_away else self.where))


if __name__ == "__main__":
    sys.exit(main())

"""Test and measure on a GPU machine, in 9 minutes: what `make gpu` runs.

    python benchmarks/gpu [--out FOLDER] [--mpiexec "mpirun ..."] [--cuda-mpi FILE] [--dry]

It says first what the machine lacks, and then runs what can be: the tests that are marked `gpu`,
both command lines on ranks that share the device, and the benchmarks.  Every step has a time limit;
one that fails or runs out of time does not keep the next from running.  Results are written after
every step, to gpu-DEVICE.json and gpu-DEVICE.md.  The status is 1 if a step failed, 2 if there was
no device.  With --dry nothing needs a device: tests are collected, benchmarks rehearsed on tiny
shapes, and the commands shown.

It uses this Python's own packages and takes nothing from a network.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from examine import ROOT, Machine, examine
from steps import ALL, CHECKS, Step, perform, steps
from table import page


def main() -> int:
    """Run, write, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python benchmarks/gpu"
    )
    parser.add_argument("--out", metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--mpiexec", default="", metavar="COMMAND")
    parser.add_argument("--cuda-mpi", default="", metavar="FILE", help="of build_cuda_mpi.sh")
    parser.add_argument("--seconds", type=float, default=ALL, help="for all steps together")
    parser.add_argument("--dry", action="store_true", help="without a device")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lvxattn-gpu-") as scratch:
        machine = examine(options.mpiexec, options.cuda_mpi, scratch)
        print(*machine.lines(), sep="\n", flush=True)
        if not options.dry and {"torch", "cupy"} <= set(machine.missing):
            print("Neither PyTorch nor CuPy has a device: nothing to run. --dry rehearses.")
            return 2
        out = Path(options.out or (scratch if options.dry else ROOT / "benchmarks" / "results"))
        rows = run(machine, Path(scratch), out, start, options.seconds, dry=options.dry)
    print_end(rows)
    return int(any(row["outcome"].startswith(("FAILED", "OUT")) for row in rows))


def run(
    machine: Machine, scratch: Path, out: Path, start: float, seconds: float, *, dry: bool
) -> list[dict[str, Any]]:
    """Run all steps, and write what is known after every one."""
    stored: dict[str, Any] = {
        "device": "rehearsal" if dry else machine.device, "rehearsal": dry,
        "python": sys.version.split()[0], "found": machine.found, "missing": machine.missing,
        "steps": [], "parts": {},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for step in steps(machine, scratch, dry=dry):
        share = seconds if step.part else seconds * CHECKS / ALL
        left = share - (time.monotonic() - start)
        print(f"\n{step.name}: {step.said()}", flush=True)
        if dry and not step.part and "pytest" not in step.needs:
            row = {"name": step.name, "command": step.said(), "outcome": "shown"}
            row |= {"seconds": 0.0, "last": "", "output": ""}
        else:
            row = perform(step, machine, left, dry=dry)
        print(f"  {row['outcome']}, {row['seconds']} s  {row['last']}", flush=True)
        if row["outcome"].startswith(("FAILED", "OUT")):
            print(*(f"  > {line}" for line in row["output"].splitlines()[-40:]), sep="\n")
        stored["steps"].append(row)
        read(step, scratch, stored["parts"])
        name = f"gpu-{stored['device']}"
        (out / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n")
        (out / f"{name}.md").write_text(page(stored))
    return list(stored["steps"])


def read(step: Step, scratch: Path, parts: dict[str, Any]) -> None:
    """Take over what a benchmark has written so far, be it cut short."""
    file = scratch / f"{step.part}.json"
    if step.part and file.is_file():
        try:
            parts[step.part] = json.loads(file.read_text())
        except ValueError:
            print(f"  {file.name} was cut short while it was written", flush=True)


def print_end(rows: list[dict[str, Any]]) -> None:
    """Print all outcomes, last, where a reader of the end of the output finds them."""
    print("\nAll steps:")
    for row in rows:
        print(f"  {row['outcome']:24} {row['seconds']:6} s  {row['name']}  {row['last'][:90]}")


if __name__ == "__main__":
    sys.exit(main())

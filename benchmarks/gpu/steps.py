"""What is run on a GPU machine, in which order, and for how long at most."""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examine import ROOT, Machine

HERE = Path(__file__).resolve().parent
# Seconds: of all, and of what comes before the benchmarks, so that these have theirs.
ALL, CHECKS = 535.0, 265.0
# Fewer seconds than this are not worth a start.
WORTH = 8.0
SIZES = "--text-tokens 256 --visual-tokens 16384 --heads 8 --kv-heads 2 --head-dim 128"


@dataclass
class Step:
    """One thing to run.

    Attributes
    ----------
    limit : float
        Seconds.
    needs : tuple of str
        What of `examine.PROBES` there has to be.
    part : str
        Of the benchmarks, the one that is measured.
    """

    name: str
    command: list[str]
    limit: float
    needs: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    part: str = ""

    def said(self) -> str:
        """Return the command as one would type it."""
        given = [f"{name}={value}" for name, value in self.env.items()]
        return shlex.join([*given, *self.command])


def steps(machine: Machine, scratch: Path, *, dry: bool = False) -> list[Step]:
    """Return all steps; rehearsed, tests are only collected and benchmarks take no device."""
    return [*checks(machine, dry=dry), *parts(scratch, dry=dry)]


def checks(machine: Machine, *, dry: bool) -> list[Step]:
    """Return the tests that are marked `gpu`, and the commands checking themselves on ranks."""
    python = sys.executable
    # Warnings of another version's packages are not what is tested here.
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    pytest += ["--collect-only"] if dry else ["-rs", "--maxfail=25"]
    found = [
        Step(f"tests {file.name}", [*pytest, str(file)], 130, ("pytest", gpu_package(file)))
        for file in marked(ROOT / "tests")
    ]
    mpi = [*(machine.launcher or ["mpiexec"]), "-n"]
    program = [python, "-m", "mpi4py", "-m", "lvxattn.mpi_impl"]
    run = ["run", "--device", "gpu", "--dtype", "float16", "--backward", "--check", *SIZES.split()]
    needs = ("cupy", "mpi4py", "mpi")
    found.append(Step("doctor, 2 ranks", [*mpi, "2", *program, "doctor"], 60, needs))
    for P, aware in ((1, "auto"), (2, "auto"), (4, "auto"), (2, "0"), (4, "0")):
        name = f"mpi_impl run, {P} ranks, {'staged' if aware == '0' else 'as MPI takes it'}"
        env = {"LVXATTN_CUDA_AWARE": aware}
        found.append(Step(name, [*mpi, str(P), *program, *run], 60, needs, env))
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    run[run.index("float16")] = "bfloat16"
    for P in (1, 2, 4):
        command = [*torchrun, str(P), "-m", "lvxattn.torch_impl", *run]
        found.append(Step(f"torch_impl run, {P} ranks", command, 60, ("torch",)))
    return found


def parts(scratch: Path, *, dry: bool) -> list[Step]:
    """Return the benchmarks, the most wanted first."""
    limits = {
        "ceilings": (30, ("torch",)),
        "local": (120, ("torch",)),
        "overhead": (40, ("torch",)),
        "errors": (40, ("torch",)),
        "million": (40, ("torch",)),
        "cupy": (80, ("torch", "cupy")),
        "merging": (60, ("torch",)),
    }
    found = []
    for part, (limit, needs) in limits.items():
        command = [sys.executable, str(HERE / "part.py"), part, "--json"]
        command += [str(scratch / f"{part}.json"), *(["--cpu"] if dry else [])]
        found.append(Step(f"benchmark {part}", command, limit, needs, part=part))
    return found


def marked(folder: Path) -> list[Path]:
    """Return the files with tests that are marked `gpu`."""
    files = sorted(folder.glob("test_*.py"))
    return [file for file in files if "pytest.mark.gpu" in file.read_text()]


def gpu_package(file: Path) -> str:
    """Return which package puts a file's arrays on a device."""
    return "torch" if "torch" in file.stem else "cupy"


def perform(step: Step, machine: Machine, seconds: float, *, dry: bool = False) -> dict[str, Any]:
    """Run a step in `seconds` at most, and return how it went; it never raises for the step's sake.

    Returns
    -------
    dict
        ``outcome``: ``"ok"``, ``"FAILED (status)"``, ``"OUT OF TIME"`` or ``"not run: why"``;
        ``seconds``, ``output`` (its end), ``last`` (its last line), ``command``, ``name``.
    """
    row: dict[str, Any] = {"name": step.name, "command": step.said(), "seconds": 0.0}
    lacking = [need for need in step.needs if need in machine.missing and not dry]
    if lacking:
        return {**row, "outcome": f"not run: no {', '.join(lacking)}", "output": "", "last": ""}
    limit = min(step.limit, seconds)
    if limit < min(WORTH, step.limit):
        return {**row, "outcome": "not run: no time left", "output": "", "last": ""}
    start = time.monotonic()
    output, status = _run(step, machine, limit)
    lines = output.strip().splitlines()
    outcome = {0: "ok", None: "OUT OF TIME"}.get(status, f"FAILED ({status})")
    return {
        **row, "outcome": outcome, "seconds": round(time.monotonic() - start, 1),
        "output": "\n".join(lines[-200:]), "last": lines[-1][:120] if lines else "",
    }  # fmt: skip


def _run(step: Step, machine: Machine, limit: float) -> tuple[str, int | None]:
    """Return what a command printed, and its status, or None if it had to be stopped."""
    try:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=machine.env | step.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return str(error), 127
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # Ranks may have sessions of their own: a launcher that is asked first takes them along.
        _end(process)
        return _rest(process), None
    return output, process.returncode


def _end(process: "subprocess.Popen[str]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)


def _rest(process: "subprocess.Popen[str]") -> str:
    """Return what is left of the output, without waiting for others who hold the pipe."""
    try:
        return process.communicate(timeout=3)[0]
    except subprocess.TimeoutExpired as late:
        return str(late.stdout or "")

"""The steps on a GPU machine, in order, with their time limits."""

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examine import Machine
from process import ROOT, run

HERE = Path(__file__).resolve().parent
# Time limits in seconds: of all steps, and of those before the benchmarks.
ALL, CHECKS = 535.0, 265.0
# Minimum seconds left to start a step.
WORTH = 8.0
NO_TIME = "not run: no time left"
SIZES = "--text-tokens 256 --visual-tokens 16384 --heads 8 --kv-heads 2 --head-dim 128"


@dataclass
class Step:
    """A command to run.

    Attributes
    ----------
    limit : float
        Seconds.
    needs : tuple of str
        Required keys of `examine.PROBES`.
    part : str
        The benchmark that the step measures, if any.
    shown : bool
        Whether the command is only shown.
    """

    name: str
    command: list[str]
    limit: float
    needs: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    part: str = ""
    shown: bool = False

    def said(self) -> str:
        """Return the command as text."""
        given = [f"{name}={value}" for name, value in self.env.items()]
        return shlex.join([*given, *self.command])

    def row(self, outcome: str, seconds: float = 0.0, output: str = "") -> dict[str, Any]:
        """Return the outcome as it is stored: with the end of the output, and its last line."""
        lines = output.strip().splitlines()
        return {
            "name": self.name, "command": self.said(), "outcome": outcome,
            "seconds": round(seconds, 1), "output": "\n".join(lines[-200:]),
            "last": lines[-1][:120] if lines else "",
        }  # fmt: skip


def steps(machine: Machine, scratch: Path, *, dry: bool = False) -> list[Step]:
    """Return all steps.

    Rehearsed, tests are only collected, commands are shown, and benchmarks take no device: NumPy
    stands in for CuPy.
    """
    found = [*checks(machine, dry=dry), *parts(scratch, dry=dry)]
    for step in found if dry else ():
        step.needs = tuple(need for need in step.needs if need != "cupy")
    return found


def checks(machine: Machine, *, dry: bool) -> list[Step]:
    """Return the tests that are marked `gpu`, and the commands checking themselves on ranks."""
    python = sys.executable
    # Other versions of packages may warn.
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    pytest += ["--collect-only"] if dry else ["-rs", "--maxfail=25"]
    found = []
    for file in marked(ROOT / "tests"):
        needs = "numpy", "pytest", gpu_package(file)
        found.append(Step(f"tests {file.name}", [*pytest, str(file)], 130, needs))
    mpi = [*(machine.launcher or ["mpiexec"]), "-n"]
    program = [python, "-m", "mpi4py", "-m", "lvxattn.mpi_impl"]
    attend = f"run --device gpu --dtype float16 --backward --check {SIZES}".split()
    needs = "numpy", "cupy", "mpi4py", "mpi"
    command = [*mpi, "2", *program, "doctor"]
    found.append(Step("doctor, 2 ranks", command, 60, needs, shown=dry))
    for P, aware in ((1, "auto"), (2, "auto"), (4, "auto"), (2, "0"), (4, "0")):
        name = f"mpi_impl run, {P} ranks, {'staged' if aware == '0' else 'as MPI takes it'}"
        env = {"LVXATTN_CUDA_AWARE": aware}
        command = [*mpi, str(P), *program, *attend]
        found.append(Step(name, command, 60, needs, env, shown=dry))
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    attend[attend.index("float16")] = "bfloat16"
    for P in (1, 2, 4):
        command = [*torchrun, str(P), "-m", "lvxattn.torch_impl", *attend]
        name = f"torch_impl run, {P} ranks"
        found.append(Step(name, command, 60, ("numpy", "torch"), shown=dry))
    return found


def parts(scratch: Path, *, dry: bool) -> list[Step]:
    """Return the benchmarks, the most important first."""
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
        found.append(Step(f"benchmark {part}", command, limit, ("numpy", *needs), part=part))
    return found


def marked(folder: Path) -> list[Path]:
    """Return the files with tests that are marked `gpu`."""
    files = sorted(folder.glob("test_*.py"))
    return [file for file in files if "pytest.mark.gpu" in file.read_text()]


def gpu_package(file: Path) -> str:
    """Return the package that a test file uses on a device."""
    return "torch" if "torch" in file.stem else "cupy"


def perform(step: Step, machine: Machine, seconds: float, *, dry: bool = False) -> dict[str, Any]:
    """Run a step in at most `seconds`, and return its outcome; a failing step does not raise.

    Returns
    -------
    dict
        ``outcome``: ``"ok"``, ``"FAILED (status)"``, ``"OUT OF TIME"``, ``"shown"`` or
        ``"not run: why"``; ``seconds``, ``output`` (its end), ``last`` (its last line),
        ``command``, ``name``.
    """
    there = machine.installed if dry else set()
    lacking = [need for need in step.needs if need in machine.missing and need not in there]
    if step.shown:
        return step.row("shown")
    if lacking:
        return step.row(f"not run: no {', '.join(lacking)}")
    limit = min(step.limit, seconds)
    if limit < min(WORTH, step.limit):
        return step.row(NO_TIME)
    start = time.monotonic()
    ended = run(step.command, machine.env | step.env, limit, joined=True)
    outcome = {0: "ok", None: "OUT OF TIME"}.get(ended.status, f"FAILED ({ended.status})")
    return step.row(outcome, time.monotonic() - start, ended.out)

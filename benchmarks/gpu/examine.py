"""What a GPU run needs: which of it this machine has, and why the rest is missing.

Packages are imported in other processes only: a broken one must not end the run.
"""

import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from process import ROOT, Ended, run

# Needs of steps: the program that tests for each, and a description.  A package prints its version
# before it looks for a device: that is enough for a rehearsal.
PROBES = {
    "numpy": ("import numpy; print(numpy.__version__)", "NumPy 2"),
    "pytest": (
        "import hypothesis, ml_dtypes, pytest, pytest_timeout; print(pytest.__version__)",
        "pytest, pytest-timeout, hypothesis and ml_dtypes",
    ),
    "torch": (
        "import torch; print(torch.__version__, flush=True);"
        "assert torch.cuda.is_available(), 'it finds no device';"
        "print(torch.__version__, torch.cuda.device_count(), torch.cuda.get_device_name(0))",
        "PyTorch with CUDA and a device",
    ),
    "cupy": (
        "import cupy; print(cupy.__version__, flush=True);"
        "assert cupy.cuda.runtime.getDeviceCount(); assert int(cupy.arange(4).sum()) == 6;"
        "print(cupy.__version__, cupy.cuda.runtime.getDeviceProperties(0)['name'].decode())",
        "CuPy for the driver's CUDA and a device",
    ),
    "triton": ("import triton; print(triton.__version__)", "Triton"),
    "nvcc": ("import shutil; print(shutil.which('nvcc') or exit('not on PATH'))", "CUDA's nvcc"),
    "mpi4py": ("import mpi4py; print(mpi4py.__version__)", "mpi4py"),
}
DRIVER = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
# Time limits in seconds: of a probe, and of the last one, which starts a self-test of the MPI.
PROBE, PROOF = 60.0, 80.0
TWO = (
    "from mpi4py import MPI;"
    "said = MPI.Get_library_version().splitlines()[0].split(',')[0].split();"
    "MPI.COMM_WORLD.rank or print('answer:', MPI.COMM_WORLD.size, *said, flush=True)"
)
AWARE = (
    "from lvxattn.mpi_impl.transport.cuda_aware import cuda_aware; yes, why = cuda_aware();"
    "print('answer:', 'yes,' if yes else 'no,', 'by', why)"
)
UNPROVED = (
    "from lvxattn.mpi_impl.transport.cuda_aware import library_says; yes, why = library_says();"
    "print('answer:', 'yes, unproved without CuPy,' if yes else 'no,', 'by', why)"
)
RULER = re.compile(r"[\W_]*")
RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")


@dataclass
class Machine:
    """What a machine has and lacks.

    Attributes
    ----------
    env : dict
        The environment of every step.
    launcher : list of str
        The command that starts MPI programs; empty if none starts two ranks.
    found, missing : dict
        By need: its probe's output, and why it is missing.
    installed : set of str
        Needs that are installed, with or without a device.
    """

    env: dict[str, str]
    launcher: list[str] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    installed: set[str] = field(default_factory=set)

    @property
    def device(self) -> str:
        """The name of the device in letters, digits and dashes, for file names."""
        name = self.found.get("driver", "").partition(",")[0]
        name = name or self.found.get("torch", "").partition(" ")[2].partition(" ")[2]
        name = name or self.found.get("cupy", "").partition(" ")[2]
        words = re.findall("[a-z0-9]+", name.lower().replace("nvidia", ""))
        return "-".join(words) or "device"

    def lines(self) -> list[str]:
        """Return the needs found and missing, as text."""
        there = [f"  {need:8} {said}" for need, said in self.found.items()]
        gone = [f"  {need:8} MISSING: {why}" for need, why in self.missing.items()]
        return there + gone


def examine(mpiexec: str = "", cuda_mpi: str = "", scratch: str = "") -> Machine:
    """Examine this machine.

    Parameters
    ----------
    mpiexec : str
        The launcher with its options, if the user names one.
    cuda_mpi : str
        The folder or tar file that `build_cuda_mpi.sh` makes.
    scratch : str
        A folder to unpack a tar file into.

    Raises
    ------
    ValueError
        `cuda_mpi` is not such a folder or file.
    """
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    env |= {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "4"), "PYTHONUNBUFFERED": "1"}
    machine, named = Machine(env), shlex.split(mpiexec)
    if cuda_mpi:
        machine.env, named = carried(Path(cuda_mpi), Path(scratch), env)
    note(machine, "driver", shlex.split(DRIVER), "a driver of NVIDIA's")
    for need, (program, what) in PROBES.items():
        note(machine, need, [sys.executable, "-c", program], what)
    find_mpi(machine, [named] if named else list(launchers(machine.env)))
    if machine.launcher:
        aware = AWARE if "cupy" in machine.found else UNPROVED
        one = [*machine.launcher, "-n", "1", sys.executable, "-c", aware]
        note(machine, "aware", one, "an answer whether the MPI is CUDA-aware", PROOF)
    return machine


def note(
    machine: Machine, need: str, command: list[str], what: str, seconds: float = PROBE
) -> bool:
    """Run a probe, and record its output or its failure."""
    ended = run(command, machine.env, seconds)
    lines = ended.out.strip().splitlines()
    # An MPI may print more.
    answers = [line.removeprefix("answer: ") for line in lines if line.startswith("answer: ")]
    said = (answers or lines)[-1:]
    if said:
        machine.installed.add(need)
    if ended.status == 0 and said:
        machine.found[need] = said[0]
        return True
    machine.missing[need] = f"{what}: {reason(ended, seconds)}"
    return False


def reason(ended: Ended, seconds: float) -> str:
    """Return why a probe failed, in one line: Python's exception, or else the first output."""
    if ended.status is None:
        return f"not done after {seconds:g} s"
    if ended.status == 0:
        return "it says nothing"
    lines = [line.strip() for line in (ended.err.strip() or ended.out).splitlines()]
    lines = [line for line in lines if not RULER.fullmatch(line)]
    raised = [number for number, line in enumerate(lines) if RAISED.match(line)]
    # Open MPI's boxes begin with the problem; a message may continue in a second line.
    if raised:
        return " ".join(lines[raised[0] :][:2])[:300]
    status = "" if ended.err.strip() else f"(status {ended.status})"
    return f"{' '.join(lines[:3])[:300]} {status}".strip()


def find_mpi(machine: Machine, candidates: list[list[str]]) -> None:
    """Choose the first launcher that starts two ranks of one communicator."""
    reasons = []
    for launcher in candidates:
        two = [*launcher, "-n", "2", sys.executable, "-c", TWO]
        if note(machine, "mpi", two, f"two ranks by {launcher[0]}"):
            ranks, _, library = machine.found.pop("mpi").partition(" ")
            if ranks == "2":
                machine.missing.pop("mpi", None)
                machine.found["mpi"] = f"{library}, started by {launcher[0]}"
                machine.launcher = launcher
                machine.env["LVXATTN_MPIEXEC"] = shlex.join(launcher)
                return
            reasons.append(f"{launcher[0]} starts ranks that are each alone, of {library}")
        else:
            reasons.append(machine.missing.pop("mpi"))
    none = "no mpiexec or mpirun: name one (MPIEXEC=), or carry one (CUDA_MPI=)"
    machine.missing["mpi"] = "; ".join(reasons) or none


def launchers(env: dict[str, str]) -> Iterator[list[str]]:
    """Yield launchers in order of preference: the tests', a carried one, the one beside Python."""
    if env.get("LVXATTN_MPIEXEC"):
        yield shlex.split(env["LVXATTN_MPIEXEC"])
        return
    carried_ = shutil.which("mpirun", path=env.get("PATH"))
    if carried_ and "CUDA_MPI_FLAGS" in env:
        yield [carried_, *env["CUDA_MPI_FLAGS"].split()]
    beside = [str(Path(sys.executable).with_name(name)) for name in ("mpiexec", "mpirun")]
    seen = set()
    for name in (*beside, "mpirun", "mpiexec"):
        path = shutil.which(name, path=env.get("PATH"))
        if path and os.path.realpath(path) not in seen:  # both names are often one program
            seen.add(os.path.realpath(path))
            yield [path]


def carried(mpi: Path, scratch: Path, env: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the launcher of an MPI that `build_cuda_mpi.sh` made.

    Raises
    ------
    ValueError
        There is none, or it is damaged.
    """
    expected = "CUDA_MPI: expected what build_cuda_mpi.sh made"
    mpi = mpi.expanduser()
    if not mpi.exists():
        raise ValueError(f"{expected}, and there is no {mpi}")
    if mpi.is_file():
        try:
            with tarfile.open(mpi) as tar:
                tar.extractall(scratch, filter="tar")
        except Exception as error:  # compression formats raise various errors
            why = str(error).partition("\n")[0]
            raise ValueError(f"{expected}, and {mpi} cannot be unpacked: {why}") from error
        mpi = scratch / "cuda-mpi"
    script = mpi.resolve() / "env.sh"
    if not script.is_file():
        raise ValueError(f"{expected}, found no {script}")
    program = f". {shlex.quote(str(script))} && exec {shlex.quote(sys.executable)} -c "
    program += shlex.quote("import json, os; print(json.dumps(dict(os.environ)))")
    ended = run(["bash", "-c", program], env, PROBE)
    try:
        inside: dict[str, Any] = json.loads(ended.out)
        flags = shlex.split(inside["CUDA_MPI_FLAGS"])
    except (KeyError, ValueError):
        why = reason(ended, PROBE) if ended.status else "it sets no CUDA_MPI_FLAGS"
        raise ValueError(f"{expected}, and {script} fails: {why}") from None
    bin_ = script.parent / "ompi" / "bin"
    mpirun = shutil.which("mpirun", path=inside["PATH"])
    if not mpirun or not Path(mpirun).is_relative_to(script.parent):
        raise ValueError(f"{expected}, found no mpirun in {bin_}")
    return inside, [mpirun, *flags]

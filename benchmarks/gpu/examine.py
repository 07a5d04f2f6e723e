"""What this machine has of what a GPU run needs, and what goes without if it lacks something.

Nothing here imports a package in its own process: one that is broken must not end the run.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# What a step needs, what asks for it, and what it takes to have it.
PROBES = {
    "numpy": ("import numpy; print(numpy.__version__)", "NumPy 2"),
    "pytest": (
        "import hypothesis, ml_dtypes, pytest, pytest_timeout; print(pytest.__version__)",
        "pytest, pytest-timeout, hypothesis and ml_dtypes",
    ),
    "torch": (
        "import torch; assert torch.cuda.is_available(), 'it finds no device';"
        "print(torch.__version__, torch.cuda.device_count(), torch.cuda.get_device_name(0))",
        "PyTorch with CUDA and a device",
    ),
    "cupy": (
        "import cupy; assert cupy.cuda.runtime.getDeviceCount();"
        "print(cupy.__version__, int(cupy.arange(4).sum()))",
        "CuPy for the driver's CUDA and a device",
    ),
    "triton": ("import triton; print(triton.__version__)", "Triton"),
    "nvcc": ("import shutil; print(shutil.which('nvcc') or exit('not on PATH'))", "CUDA's nvcc"),
    "mpi4py": ("import mpi4py; print(mpi4py.__version__)", "mpi4py"),
}
DRIVER = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
TWO = (
    "from mpi4py import MPI; said = MPI.COMM_WORLD.size, MPI.Get_library_version().split(',')[0];"
    "MPI.COMM_WORLD.rank or print('answer:', *said, flush=True)"
)
AWARE = "from lvxattn.mpi_impl.awareness import cuda_aware; print('answer:', *cuda_aware())"


@dataclass
class Machine:
    """What there is.

    Attributes
    ----------
    env : dict
        The environment of every step.
    launcher : list of str
        That of MPI programs; empty where there is none that starts two ranks.
    found, missing : dict
        By need, what was said of it, and why it is not there.
    """

    env: dict[str, str]
    launcher: list[str] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The name of the device, in letters, digits and dashes, to name files by."""
        name = self.found.get("driver", "no device").splitlines()[0].partition(",")[0]
        return "-".join(name.lower().replace("nvidia", "").split()) or "device"

    def lines(self) -> list[str]:
        """Return what there is and what is missing, for a reader."""
        there = [f"  {need:8} {said}" for need, said in self.found.items()]
        gone = [f"  {need:8} MISSING: {why}" for need, why in self.missing.items()]
        return there + gone


def examine(mpiexec: str = "", cuda_mpi: str = "", scratch: str = "") -> Machine:
    """Look at what there is.

    Parameters
    ----------
    mpiexec : str
        The launcher, with its flags, if the user named one.
    cuda_mpi : str
        The folder or tar file that `build_cuda_mpi.sh` made.
    scratch : str
        A folder that a tar file may be unpacked into.
    """
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    env |= {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "4"), "PYTHONUNBUFFERED": "1"}
    machine = Machine(env)
    note(machine, "driver", shlex.split(DRIVER), "a driver of NVIDIA's")
    for need, (program, what) in PROBES.items():
        note(machine, need, [sys.executable, "-c", program], what)
    if cuda_mpi:
        machine.env, mpiexec = carried(Path(cuda_mpi), Path(scratch), env)
    launcher = shlex.split(mpiexec) or first_launcher()
    two = [*launcher, "-n", "2", sys.executable, "-c", TWO]
    if not launcher:
        machine.missing["mpi"] = "no mpiexec or mpirun: name one, or carry one (CUDA_MPI=)"
    elif note(machine, "mpi", two, f"an MPI that {shlex.join(launcher)} and mpi4py agree on"):
        said = machine.found["mpi"]
        if said.startswith("2 "):
            machine.launcher = launcher
            machine.env["LVXATTN_MPIEXEC"] = shlex.join(launcher)
            one = [*launcher, "-n", "1", sys.executable, "-c", AWARE]
            note(machine, "aware", one, "an answer whether the MPI is CUDA-aware")
        else:
            del machine.found["mpi"]
            machine.missing["mpi"] = f"two ranks were started, and each is alone: {said}"
    return machine


def note(machine: Machine, need: str, command: list[str], what: str) -> bool:
    """Run a probe, and write down what it says or that it fails."""
    try:
        ended = subprocess.run(
            command, env=machine.env, capture_output=True, text=True, timeout=60, check=False
        )
        last = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
        failed = last if ended.returncode else ""
        lines = ended.stdout.strip().splitlines()
        # An MPI may have something to say of its own.
        answers = [line.removeprefix("answer: ") for line in lines if line.startswith("answer: ")]
        said = (answers or lines)[:1]
    except (OSError, subprocess.TimeoutExpired) as error:
        failed, said = str(error), []
    if failed or not said:
        machine.missing[need] = f"{what}: {failed or 'it says nothing'}"[:300]
        return False
    machine.found[need] = said[0]
    return True


def first_launcher() -> list[str]:
    """Return the launcher of this Python's environment, or of the machine."""
    beside = [str(Path(sys.executable).with_name(name)) for name in ("mpiexec", "mpirun")]
    for name in (*beside, "mpirun", "mpiexec"):
        found = shutil.which(name)
        if found:
            return [found]
    return []


def carried(mpi: Path, scratch: Path, env: dict[str, str]) -> tuple[dict[str, str], str]:
    """Return the environment and the launcher of an MPI that `build_cuda_mpi.sh` made.

    Raises
    ------
    SystemExit
        There is none at that place.
    """
    if mpi.is_file():
        with tarfile.open(mpi) as tar:
            tar.extractall(scratch, filter="tar")
        mpi = scratch / "cuda-mpi"
    script = mpi.resolve() / "env.sh"
    if not script.is_file():
        raise SystemExit(f"CUDA_MPI: expected what build_cuda_mpi.sh made, found no {script}")
    program = f". {shlex.quote(str(script))} && exec {shlex.quote(sys.executable)} -c "
    program += shlex.quote("import json, os; print(json.dumps(dict(os.environ)))")
    ended = subprocess.run(
        ["bash", "-c", program], env=env, capture_output=True, text=True, check=True
    )
    inside: dict[str, Any] = json.loads(ended.stdout)
    mpirun = shutil.which("mpirun", path=inside["PATH"])
    return inside, f"{mpirun} {inside['CUDA_MPI_FLAGS']}"

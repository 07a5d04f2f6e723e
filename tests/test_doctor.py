"""The doctor: its report on sound ranks, and the problems that it finds."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from lvxattn.common import shared_memory
from lvxattn.common.launcher import claim, mismatch, speaks
from lvxattn.mpi_impl.__main__ import main
from lvxattn.mpi_impl.commands.doctor.examination import _print_ranks, examine, find_problems
from lvxattn.mpi_impl.commands.doctor.rank_info import Link, RankInfo
from tests import fake_cupy
from tests.commands import commands

SOUND = RankInfo(
    host="a",
    cores=frozenset(range(4)),
    library="MPI 1",
    versions="Python, NumPy",
    blas="openblas 1",
    threads=2,
    threads_from="cores divided by ranks",
    cupy="",
    devices=(),
    gpu_files=0,
    cuda_aware=(False, "asked"),
)
WITH_GPUS = replace(SOUND, cupy="13", devices=("H", "H"))
# As torchrun sets them for its first process.
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}
LINKS = [Link(1, 0, True, 1e-6, 1e9), Link(0, 1, True, 1e-6, 1e9)]


def doctor_alone(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor without mpiexec."""
    launched = ("PMI", "OMPI_", "SLURM_", "MV2_", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    clean = {n: v for n, v in os.environ.items() if not n.startswith(launched)}
    return subprocess.run(
        [sys.executable, "-m", "mpi4py", "-m", "lvxattn.mpi_impl", "doctor"],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.mpi
def test_communication_check() -> None:
    said, damaged = commands(2, ["doctor"], ["doctor"], breakages=["", "message"])
    assert (said.status, said.err) == (0, "")
    assert "2 on 1 host" in said.out
    assert "2 ranks, BLAS threads of each: 1" in said.out
    assert "within hosts, 2 links" in said.out
    assert "CUDA-aware" in said.out
    assert damaged.status == 1
    assert "ERROR: rank 1 did not receive what rank 0 sent" in damaged.out


@pytest.mark.mpi
def test_single_process_sends_nothing() -> None:
    done = doctor_alone()
    assert done.returncode == 0, done.stderr
    assert "this is one process, nothing is sent" in done.stdout
    assert "ERROR" not in done.stdout


@pytest.mark.mpi
def test_launcher_mismatch_is_printed_once() -> None:
    first = doctor_alone(PMI_SIZE="4", PMI_RANK="0")
    assert first.returncode == 1
    assert "started 4 processes (PMI_SIZE), but MPI sees 1" in first.stdout
    second = doctor_alone(PMI_SIZE="4", PMI_RANK="2")
    assert (second.returncode, second.stdout) == (1, "")
    by_torch = doctor_alone(**TORCHRUN)
    assert by_torch.returncode == 1
    assert "ERROR: torchrun or its like started 4 processes (WORLD_SIZE)" in by_torch.stdout


@pytest.mark.mpi
@pytest.mark.parametrize("command", ["run", "measure", "demo"])
@pytest.mark.parametrize(
    ("size", "rank"), [("PMI_SIZE", "PMI_RANK"), ("WORLD_SIZE", "RANK")], ids=["mpi", "torchrun"]
)
def test_other_commands_fail_on_launcher_mismatch(
    command: str,
    size: str,
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(size, "4")
    for number, wrong in (("0", f"started 4 processes ({size}), but MPI sees 1"), ("2", "")):
        monkeypatch.setenv(rank, number)
        assert main([command]) == 2
        said = capsys.readouterr()
        assert (wrong in said.err, said.out, bool(said.err)) == (True, "", number == "0")


@pytest.mark.parametrize("name", ["LVXATTN_KERNEL", "LVXATTN_CUDA_AWARE", "LVXATTN_TIMEOUT"])
def test_bad_variable_fails_every_command_and_empty_is_unset(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--text-tokens", "8", "--visual-tokens", "16", "--quiet"]
    for words in (["run", *sizes], ["doctor"]):
        monkeypatch.setenv(name, "yes")
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"lvxattn: error: {name}: ")
        assert "'yes' (on rank 0 of 1)" in said
        monkeypatch.setenv(name, "")
        assert main(words) == 0


@pytest.mark.parametrize(
    ("environment", "size", "wrong"),
    [
        ({}, 1, None),
        ({}, 4, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, 4, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, 1, "PMI_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "OMPI_COMM_WORLD_SIZE"),
        # mpirun inside an allocation: srun has started one helper a node
        ({"OMPI_COMM_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2"}, 8, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}, 1, "srun --mpi=pmix"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 8, None),  # a launcher of its own, inside a step
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, None),  # the batch script itself
        ({"PMIX_RANK": "0"}, 1, None),
        ({"PMIX_RANK": "3"}, 1, "PMIX_RANK"),
        ({"PMIX_RANK": "3"}, 4, None),
        ({"PMI_SIZE": "x"}, 1, None),
        ({"PMI_SIZE": "²"}, 1, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "²"}, 1, "PMI_SIZE"),
        ({"PMIX_RANK": "²"}, 1, None),
        (TORCHRUN | {"LOCAL_RANK": "²"}, 1, None),
        (TORCHRUN, 1, "torchrun or its like started 4 processes (WORLD_SIZE), but MPI sees 1"),
        (TORCHRUN | {"PMI_SIZE": "1", "PMI_RANK": "0"}, 1, "start the program with mpiexec"),
        (TORCHRUN, 4, None),  # a script sets them under mpiexec
        ({"WORLD_SIZE": "4", "RANK": "0"}, 1, None),
        (TORCHRUN | {"WORLD_SIZE": "1", "PMI_SIZE": "4"}, 1, "PMI_SIZE"),
    ],
)
def test_launcher_and_library_are_compared(
    environment: dict[str, str], size: int, wrong: str | None
) -> None:
    said = mismatch(environment, size)
    assert (said is None) == (wrong is None)
    if wrong and said:
        assert wrong in said


def test_one_rank_prints_on_launcher_mismatch() -> None:
    found = claim({"PMI_SIZE": "2", "PMI_RANK": "1"})
    assert found is not None
    assert found[:3] == ("PMI_SIZE", 2, 1)
    assert speaks({}, 0)
    assert speaks({"PMI_SIZE": "2", "PMI_RANK": "0"}, 0)
    assert not speaks({"PMI_SIZE": "2", "PMI_RANK": "1"}, 0)
    assert not speaks({}, 1)


def test_no_problem_found() -> None:
    assert find_problems([SOUND, SOUND], LINKS, None) == []


@pytest.mark.parametrize(
    ("ranks", "advice"),
    [
        ([replace(SOUND, cores=frozenset({0}))] * 2, "start at most 1"),
        (
            [replace(SOUND, threads=4, threads_from="OMP_NUM_THREADS")] * 2,
            "8 BLAS threads on 4 cores: unset OMP_NUM_THREADS, or set it to 2",
        ),
        (
            [replace(SOUND, threads=1, threads_from="OMP_NUM_THREADS")] * 2,
            "most of 4 cores are idle with 2 BLAS threads: unset OMP_NUM_THREADS",
        ),
        ([replace(SOUND, blas="")] * 2, "set OMP_NUM_THREADS to 2"),
        ([SOUND, replace(SOUND, library="MPI 2")], "different MPI libraries: MPI 1; MPI 2"),
        ([SOUND, replace(SOUND, versions="old")], "different versions"),
        ([replace(SOUND, gpu_files=2)] * 2, "no CuPy: the extra"),
        ([replace(SOUND, cupy="13")] * 2, "CuPy finds no GPU"),
        (
            [replace(WITH_GPUS, devices=("H",), cuda_aware=(True, ""))] * 2,
            "2 ranks share 1 GPU:",
        ),
        ([WITH_GPUS] * 2, "pinned host memory"),
        (
            # One rank's GPU is enough.
            [
                replace(WITH_GPUS, cuda_aware=(True, "asked")),
                replace(WITH_GPUS, cuda_aware=(False, "asked and a self-test: ended by SIGSEGV")),
            ],
            "by SIGSEGV): messages go through pinned host memory; find out what the library lacks",
        ),
        (
            [replace(SOUND, forgotten=("/dev/shm/mpich_shm_1_0", "/dev/shm/mpich_shm_2_0")), SOUND],
            "a: MPI jobs that ended badly have left 2 files in shared memory, which no process "
            "uses: rm /dev/shm/mpich_shm_1_0 /dev/shm/mpich_shm_2_0",
        ),
        (
            [replace(SOUND, cuda_aware=(True, "so"), denied="MPIX_Query_cuda_support")] * 2,
            "contradicts the library (MPIX_Query_cuda_support)",
        ),
    ],
)
def test_a_problem_comes_with_advice(ranks: list[RankInfo], advice: str) -> None:
    (problem,) = find_problems(ranks, LINKS, None)
    assert advice in problem.text
    assert "\n" not in problem.text
    assert not problem.fatal


def test_forgotten_shared_memory_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "mpich_shm_7_0").touch()
    assert examine(MPI.COMM_SELF)
    assert f"1 file in shared memory, which no process uses: rm {tmp_path}/mpich_shm_7_0\n" in (
        capsys.readouterr().out
    )


def test_device_memory_decision_names_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(SOUND, cuda_aware=(True, "asked and a self-test: device memory arrived"))
    other = replace(other, kernel="cuda: float16")
    _print_ranks([SOUND, other, SOUND])
    said = capsys.readouterr().out
    assert "  kernel      cuda: float16 on ranks 1\n" in said
    assert "CUDA-aware  no, by asked on ranks 0, 2\n" in said
    assert "yes, by asked and a self-test: device memory arrived on ranks 1\n" in said
    _print_ranks([SOUND, SOUND])
    assert "CUDA-aware  no, by asked\n" in capsys.readouterr().out


def stand_in(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    """Let the commands import a stand-in for CuPy that has a GPU called H."""
    runtime = cupy.cuda.runtime
    properties = {"name": b"H"}
    monkeypatch.setattr(runtime, "getDeviceProperties", lambda _: properties, raising=False)
    monkeypatch.setitem(sys.modules, "cupy", cupy)


@pytest.mark.parametrize("aware", ["0", "1"])
@pytest.mark.parametrize("whole", [True, False])
def test_device_memory_is_sent_around(
    aware: str, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cupy = import_module(f"tests.{'fake' if whole else 'wrong'}_cupy")
    stand_in(monkeypatch, cupy)
    monkeypatch.setenv("LVXATTN_CUDA_AWARE", aware)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert examine(MPI.COMM_SELF) == whole
    said = capsys.readouterr().out
    assert "kernel      tiles: cuda expects a device" in said
    assert ("contradicts the library" in said) == (aware == "1")
    assert ("device memory arrives intact" in said) == whole
    assert ("ERROR: rank 0 did not receive what rank 0 sent from its GPU" in said) != whole


def no_compiler(*given: Any) -> Any:
    """Raise as CuPy does if its kernels cannot be compiled."""
    raise RuntimeError('Failure finding "libnvrtc.so.13"\nand where it was looked for')


@pytest.mark.parametrize("missing", ["compiler", "kernel"])
def test_unusable_gpu_fails_doctor_and_run(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, fake_cupy)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = r"LVXATTN_KERNEL: 'cuda' .*8\.0.*7\.5"
    if missing == "compiler":
        monkeypatch.setattr(fake_cupy.ndarray, "__add__", no_compiler)
        expected = (
            r'CuPy cannot compute \(RuntimeError: Failure finding "libnvrtc.so.13"\); it needs'
        )
    else:
        monkeypatch.setenv("LVXATTN_KERNEL", "cuda")
    assert not examine(MPI.COMM_SELF)
    assert re.search(f"ERROR: {expected}", capsys.readouterr().out)
    sizes = ["--text-tokens", "8", "--visual-tokens", "16", "--dtype", "float16"]
    assert main(["run", "--device", "gpu", *sizes], MPI.COMM_SELF) == 2
    assert re.search(f"error: {expected}", capsys.readouterr().err)


def test_run_names_the_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, fake_cupy)
    monkeypatch.setenv("LVXATTN_KERNEL", "tiles")
    sizes = ["--text-tokens", "8", "--visual-tokens", "16", "--check", "--backward"]
    assert main(["run", "--device", "gpu", *sizes], MPI.COMM_SELF) == 0
    said = capsys.readouterr().out
    assert "\n  kernel    tiles: LVXATTN_KERNEL=tiles\n" in said
    assert "GPU 0 H" in said


def test_communication_problems_are_fatal() -> None:
    broken = [replace(LINKS[0], whole=False), LINKS[1]]
    first, second = find_problems([SOUND, SOUND], broken, "4 processes, but MPI sees 1")
    assert first.fatal
    assert second.fatal
    assert "rank 0 did not receive what rank 1 sent" in second.text

"""The doctor: its report on sound ranks, and the problems that it finds."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mpi4py import MPI

from lvxattn.cli.doctor import RankInfo
from lvxattn.cli.doctor import links as doctor_links
from lvxattn.cli.doctor.links import Link, clocks_of_hosts, sees_folder
from lvxattn.cli.doctor.network import Attempt, Place, unreachable
from lvxattn.cli.doctor.problems import Findings, find_problems
from lvxattn.cli.doctor.report import print_ranks
from lvxattn.common import shared_memory
from lvxattn.common.launcher import claim, mismatch, speaks
from lvxattn.mpi_impl.__main__ import main
from lvxattn.mpi_impl.commands.doctor import remarks, run_doctor
from lvxattn.mpi_impl.transport import start
from lvxattn.plan.trace import Clock
from tests import fake_cupy
from tests.commands import commands
from tests.launch import launch

SOUND = RankInfo(
    host="a",
    cores=frozenset(range(4)),
    offered=4,
    common_versions={"Python": "3", "NumPy": "2"},
    transport=("MPI", "MPI 1"),
    arrays="NumPy with openblas 1",
    threads=2,
    details={"CUDA-aware": "no, by asked"},
)
OTHER = replace(SOUND, host="b")
WITH_GPUS = replace(SOUND, devices=("H", "H"))
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
@pytest.mark.parametrize(
    ("implementation", "threads", "transport"),
    [
        ("mpi_impl", "BLAS threads", r"MPI .*, MPI \d"),
        ("torch_impl", "threads", "backend     gloo"),
    ],
)
def test_communication_check(implementation: str, threads: str, transport: str) -> None:
    if implementation == "torch_impl":
        pytest.importorskip("torch")
    said, damaged = commands(
        2,
        ["doctor"],
        ["doctor"],
        breakages=["", "message"],
        implementation=implementation,
    )
    assert (said.status, said.err) == (0, "")
    assert "2 on 1 host" in said.out
    assert f"2 ranks, {threads} of each: 1" in said.out
    assert "within hosts, 2 links" in said.out
    assert re.search(rf"^  {transport}", said.out, re.M)
    assert ("CUDA-aware" in said.out) == (implementation == "mpi_impl")
    assert damaged.status == 1
    assert "ERROR: rank 1 did not receive what rank 0 sent" in damaged.out


@pytest.mark.mpi
def test_ranks_that_are_bound_to_one_core_are_named() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or not shutil.which("taskset"):
        pytest.skip("needs two cores, and taskset")
    beside = str(Path(sys.executable).with_name("mpiexec"))
    mpiexec = shlex.split(os.environ.get("LVXATTN_MPIEXEC", "")) or [beside]
    bound = ["taskset", "-c", str(cores[0]), sys.executable, "-m", "mpi4py"]
    done = launch([*mpiexec, "-n", "2", *bound, "-m", "lvxattn.mpi_impl", "doctor"], timeout=100)
    assert (done.status, done.left) == (0, ()), done.err
    assert (
        f"ranks 0, 1 are bound to 1 core of {len(cores)} ({cores[0]}) and compete for it"
        in done.out
    )


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
    assert find_problems([SOUND, SOUND], Findings(links=LINKS)) == []
    clocks, sees = {"b": Clock(0.3, 0.25)}, [True, True]
    assert find_problems([SOUND, OTHER], Findings(None, LINKS, (), clocks, sees)) == []


@pytest.mark.parametrize(
    ("ranks", "advice"),
    [
        ([replace(SOUND, cores=frozenset({0}), offered=1)] * 2, "start at most 1"),
        (
            [replace(SOUND, cores=frozenset({0}))] * 2,
            "a: ranks 0, 1 are bound to 1 core of 4 (0) and compete for it: mpirun --bind-to none",
        ),
        (
            [*[replace(SOUND, cores=frozenset({2}))] * 2, replace(SOUND, cores=frozenset({3}))],
            "a: ranks 0, 1 are bound to 1 core of 4 (2)",
        ),
        (
            [replace(SOUND, cores=frozenset({n}), threads=1, offered=16) for n in (0, 1)],
            "a: 2 ranks bound to 2 of 16 cores, most are idle: give each 8, with mpirun --map-by "
            "slot:PE=8 or srun --cpus-per-task=8",
        ),
        (
            [SOUND, SOUND, replace(OTHER, threads=4)],
            "a rank has 2 cores on a, 4 on b: all wait for the slowest",
        ),
        (
            [replace(SOUND, threads=4, threads_from="OMP_NUM_THREADS")] * 2,
            "8 threads on 4 cores: unset OMP_NUM_THREADS, or set it to 2",
        ),
        (
            [replace(SOUND, threads=1, threads_from="OMP_NUM_THREADS")] * 2,
            "most of 4 cores are idle with 2 threads: unset OMP_NUM_THREADS",
        ),
        (
            [SOUND, replace(SOUND, transport=("MPI", "MPI 2"))],
            "different MPI libraries: MPI 1 on rank 0 on a; MPI 2 on rank 1 on a: use one",
        ),
        (
            [SOUND, SOUND, *[replace(OTHER, common_versions={"Python": "4", "NumPy": "2"})] * 2],
            "different versions of Python: 3 on a; 4 on b: use one environment on all hosts",
        ),
        (
            [replace(SOUND, versions={"CUDA": "12.8"}), replace(OTHER, versions={"CUDA": "13.0"})],
            "different versions of CUDA: 12.8 on a; 13.0 on b",
        ),
        ([replace(SOUND, code="1"), replace(OTHER, code="2")], "files differ between a; b, though"),
        (
            [replace(SOUND, prefix="/x"), replace(OTHER, prefix="/y")],
            "different Python environments: /x on a; /y on b: activate one",
        ),
        ([replace(WITH_GPUS, devices=("H",))] * 2, "2 ranks share 1 GPU:"),
        ([replace(SOUND, remarks=("no CuPy",))] * 2, "a: no CuPy"),
        (
            [replace(SOUND, shm=(2**26, 2**26)), SOUND],
            "a: /dev/shm has 64 MiB, 64 MiB free, and MPI, NCCL and PyTorch need more for messages "
            "within the host: start the container with --shm-size=8g or --ipc=host, else mount",
        ),
        ([replace(SOUND, shm=(2**33, 2**20)), SOUND], "/dev/shm has 8,192 MiB, 1 MiB free"),
        (
            [replace(SOUND, limits={"open files": 100})] * 2,
            "a: at most 100 open files (ulimit -n), and these ranks need 132: `* - nofile 65536` "
            "in /etc/security/limits.conf; Slurm passes the limits of the shell that submits",
        ),
        (
            [replace(SOUND, limits={"processes": 400}, tasks=390)] * 2,
            "a: at most 400 processes (ulimit -u), and these ranks need 410: `* - nproc 65536`",
        ),
        (
            [replace(SOUND, limits={"locked memory": 2**23}, infiniband=True)] * 2,
            "a: at most 8 MiB locked memory (ulimit -l), and these ranks need unlimited, as "
            "InfiniBand locks its buffers: `* - memlock unlimited`",
        ),
        (
            [replace(info, addresses={"docker0": "172.17.0.1"}) for info in (SOUND, OTHER)],
            "docker0 has the address 172.17.0.1 on a, b: it does not lead from one to the other; "
            "select the interface between hosts: FI_TCP_IFACE, UCX_NET_DEVICES or OMPI_MCA_btl",
        ),
        (
            [replace(SOUND, forgotten=("/dev/shm/mpich_shm_1_0", "/dev/shm/mpich_shm_2_0")), SOUND],
            "a: MPI jobs that ended badly have left 2 files in shared memory, which no process "
            "uses: rm /dev/shm/mpich_shm_1_0 /dev/shm/mpich_shm_2_0",
        ),
    ],
)
def test_a_problem_comes_with_advice(ranks: list[RankInfo], advice: str) -> None:
    (problem,) = find_problems(ranks, Findings(links=LINKS))
    assert advice in problem.text
    assert "\n" not in problem.text
    assert not problem.fatal


@pytest.mark.parametrize(
    "sound",
    [
        replace(SOUND, limits={"locked memory": 2**13, "core file": 0, "open files": 1024}),
        replace(SOUND, limits={"locked memory": None}, infiniband=True),
        replace(SOUND, limits={"processes": 500}, tasks=0),  # root's
        replace(SOUND, threads=1),
        replace(SOUND, addresses={"docker0": "172.17.0.1"}, interface_from="FI_TCP_IFACE=e0"),
    ],
)
def test_what_hurts_nobody_is_no_problem(sound: RankInfo) -> None:
    ranks = [sound, sound, replace(sound, host="b"), replace(sound, host="b")]
    assert find_problems(ranks, Findings(links=LINKS)) == []


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        (
            Findings(clocks={"b": Clock(-2.0, 0.1)}),
            "b's clock is 2 s behind a's: synchronize them (chronyd or ntpd)",
        ),
        (Findings(clocks={"b": Clock(0.25, 0.1)}), "b's clock is 0.25 s ahead of a's"),
        (Findings(sees=[True, False]), "b (in ) does not see a's current folder, : start in a"),
        (
            Findings(links=[replace(LINKS[0], bandwidth=2e8), LINKS[1]]),
            "the link from rank 1 on b to rank 0 on a is 5 times slower than the median of its "
            "kind: 0.2 GB/s; look for a port or cable at a lower rate",
        ),
    ],
)
def test_what_hosts_found_out_comes_with_advice(found: Findings, advice: str) -> None:
    (problem,) = find_problems([SOUND, OTHER], found)
    assert advice in problem.text
    assert not problem.fatal


def test_link_is_slow_among_links_of_its_kind() -> None:
    ranks = [SOUND, SOUND, OTHER, OTHER]
    rates = [1e9, 5e9, 1e9, 4e8]  # from rank 3 to 0 and from 1 to 2 between hosts
    links = [Link((n - 1) % 4, n, True, 1e-6, rate) for n, rate in enumerate(rates)]
    (problem,) = find_problems(ranks, Findings(links=links))
    assert problem.text.startswith("the link from rank 2 on b to rank 3 on b is 12 times slower")


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"blas": ""}, "does not know NumPy's BLAS: set OMP_NUM_THREADS"),
        ({"cupy": "13"}, "CuPy finds no GPU"),
        ({"cupy": "13", "devices": ("H",)}, "messages go through pinned host memory; a CUDA-aware"),
        (
            {"cupy": "13", "devices": ("H",), "aware": (False, "asked and a self-test: SIGSEGV")},
            "SIGSEGV): messages go through pinned host memory; find out what the library lacks",
        ),
        (
            {"aware": (True, "so"), "denied": "MPIX_Query_cuda_support"},
            "contradicts the library (MPIX_Query_cuda_support)",
        ),
    ],
)
def test_remark_on_the_libraries_of_a_rank(given: dict[str, Any], advice: str) -> None:
    usual = {"blas": "openblas 1", "cupy": "", "devices": (), "aware": (False, "asked")}
    assert remarks(**{**usual, "denied": ""}) == []
    (remark,) = remarks(**{**usual, "denied": "", **given})
    assert advice in remark


def place(rank: int, own: str, **interfaces: str) -> Place:
    return Place(rank, f"host{rank}", interfaces, own, 40000 + rank, "", "32768-60999")


@pytest.mark.parametrize(
    ("own", "failures", "cure"),
    [
        (
            "10.0.0.1",
            {"10.0.0.1": "no answer in 6 s", "10.1.0.1": "no answer in 6 s"},
            "at 10.0.0.1:40001 (e0): no answer in 6 s; a firewall? Let the hosts connect to one "
            "another on ports 32768-60999, or select another interface: A, B",
        ),
        (
            "10.0.0.1",
            {"10.0.0.1": "Connection refused", "10.1.0.1": ""},
            "Connection refused; e0 is not connected to the other hosts, or a firewall closes it: "
            "set A=ib0 and B=ib0",
        ),
        (
            "127.0.1.1",
            {"127.0.1.1": "Connection refused", "10.0.0.1": "", "10.1.0.1": ""},
            "at 127.0.1.1:40001 (lo): Connection refused; the name host1 leads to the loopback "
            "there, see its /etc/hosts: set A=e0 and B=e0",
        ),
        (
            "10.0.0.1",
            {"10.0.0.1": "another process answers", "10.1.0.1": ""},
            "another host has the address 10.0.0.1, too: set A=ib0 and B=ib0",
        ),
    ],
)
def test_unreachable_host_comes_with_advice(own: str, failures: dict[str, str], cure: str) -> None:
    source = place(0, "10.0.0.9", e0="10.0.0.9")
    target = place(1, own, e0="10.0.0.1", ib0="10.1.0.1")
    tried = [Attempt(source, target, address, text) for address, text in failures.items()]
    (line,) = unreachable(tried, "A, B")
    assert line.startswith("rank 0 on host0 (e0 10.0.0.9) cannot connect to rank 1 on host1 at ")
    assert cure in line
    assert unreachable([attempt._replace(failure="") for attempt in tried], "A, B") == []


class Answered:
    """A rank whose collectives and messages are answered at once."""

    def __init__(self, rank: int, *others: Any, then: Callable[[], object] = int) -> None:
        self.rank, self.size, self.others, self.then = rank, 2, [*others], then
        self.gathered, self.watched = 0, False

    def allgather(self, mine: Any) -> list[Any]:
        self.gathered += 1
        if self.gathered == 2:
            self.then()
        other = self.others.pop(0) if self.others else mine
        return [other, mine] if self.rank else [mine, other]

    @contextmanager
    def watching(self, _: str) -> Iterator[None]:
        self.watched = True
        yield
        self.watched = False

    def send(self, *_: object) -> None:
        assert self.watched

    def receive(self, _: int) -> float:
        assert self.watched
        return 0.0


@pytest.fixture
def gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which a test may remove."""
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(doctor_links, "_APPEARS", 0.2)
    return folder


def test_folder_that_is_removed_is_not_seen(gone: Path) -> None:
    removed = Answered(0, then=lambda: shutil.rmtree(gone))
    assert sees_folder(removed) == [True, True]  # type: ignore[arg-type]
    assert removed.gathered == 2
    alone = Answered(0)
    assert sees_folder(alone) == []  # type: ignore[arg-type]
    assert alone.gathered == 1
    other = Answered(1, "file", True)
    assert sees_folder(other) == [True, False]  # type: ignore[arg-type]


def test_waits_for_clocks_are_limited() -> None:
    clocks = clocks_of_hosts(Answered(0), ["a", "a", "b"])  # type: ignore[arg-type]
    assert list(clocks) == ["b"]


def test_waits_of_pytorch_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    dist = pytest.importorskip("torch").distributed
    from lvxattn.torch_impl.commands import doctor

    given: list[timedelta] = []
    monkeypatch.setattr(dist, "get_backend", lambda _: "gloo")
    monkeypatch.setattr(dist, "monitored_barrier", lambda _, timeout, **__: given.append(timeout))
    waiting = Answered(0).watching
    group: Any = SimpleNamespace(rank=0, size=2, group=None, waiting=lambda text: waiting(text()))
    monkeypatch.delenv("LVXATTN_TIMEOUT", raising=False)
    doctor.DoctorRanks(group).start_together()
    monkeypatch.setenv("LVXATTN_TIMEOUT", "7")
    doctor.DoctorRanks(group).start_together()
    assert given == [timedelta(seconds=doctor.WAIT), timedelta(seconds=7)]


def test_rank_of_another_parent_is_not_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "end_with_parent", lambda _: None)  # as on other systems
    monkeypatch.setattr(start, "_GRACE", 0.0)
    monkeypatch.setenv("LVXATTN_TIMEOUT", "0.01")
    with subprocess.Popen(["sleep", "100"]) as another:
        start._watch(another.pid)
        another.terminate()
    assert another.returncode == -signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_forgotten_shared_memory_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "mpich_shm_7_0").touch()
    assert run_doctor(MPI.COMM_SELF) == 0
    assert f"1 file in shared memory, which no process uses: rm {tmp_path}/mpich_shm_7_0\n" in (
        capsys.readouterr().out
    )


def test_device_memory_decision_names_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    aware = "yes, by asked and a self-test: device memory arrived"
    other = replace(SOUND, details={"kernel": "cuda: float16", "CUDA-aware": aware})
    print_ranks([SOUND, other, SOUND], "mpiexec")
    said = capsys.readouterr().out
    assert "  kernel      cuda: float16 on ranks 1\n" in said
    assert "CUDA-aware  no, by asked on ranks 0, 2\n" in said
    assert "yes, by asked and a self-test: device memory arrived on ranks 1\n" in said
    print_ranks([SOUND, SOUND], "mpiexec")
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
    assert run_doctor(MPI.COMM_SELF) == (not whole)
    said = capsys.readouterr().out
    assert "kernel      tiles: cuda expects a device" in said
    assert "CUDA 13.0, CUDA's driver 13.1" in said
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
    assert run_doctor(MPI.COMM_SELF) == 1
    assert re.search(f"ERROR: {expected}", capsys.readouterr().out)
    sizes = ["--text-tokens", "8", "--visual-tokens", "16", "--dtype", "float16"]
    assert main(["run", "--device", "gpu", *sizes], MPI.COMM_SELF) == 2
    assert re.search(f"error: {expected}", capsys.readouterr().err)


def test_unusable_gpu_fails_doctor_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("the GPU of this machine can compute")
    from lvxattn.torch_impl.__main__ import main as torch_main

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    assert torch_main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "CUDA 13.0, NCCL 2.27.3\n" in said
    assert "backend     gloo, and NCCL between GPUs\n" in said
    assert "              CUDA 13.0: H, H\n" in said
    assert re.search(r"ERROR: PyTorch cannot compute on GPU 0 \(.*\), on rank 0", said)


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
    found = Findings("4 processes, but MPI sees 1", broken)
    first, second = find_problems([SOUND, SOUND], found)
    assert first.fatal
    assert second.fatal
    assert "rank 0 did not receive what rank 1 sent" in second.text

"""Slurm on the hosts of a lab: the scripts of examples/cluster, and jobs that end badly."""

import csv
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.netlab.lab import Lab, LabError, why_not
from benchmarks.netlab.slurm import Slurm, why_no_slurm
from tests.launch import PROGRAMS, ROOT, THREADS, environment, until

HOSTS = 2
START = 150.0  # seconds for ranks to start, or a job to end, on a busy machine
pytestmark = [pytest.mark.mpi, pytest.mark.slow]
# Ranks that compute until they are ended.
FOREVER = ["-m", "mpi4py", "-m", "lvxattn.mpi_impl", "run", "--quiet", "--repeat", "1000000"]
ON_ALL = ["--nodes=2", "--ntasks-per-node=2", "--mpi=pmi2"]
# Debian's Open MPI, which mpi4py finds by this name; its ranks that wait leave cores to others.
OPEN_MPI = {"MPI4PY_LIBMPI": "libmpi.so.40", "OMPI_MCA_mpi_yield_when_idle": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder that all hosts see, with an environment as the scripts expect it."""
    path = tmp_path_factory.mktemp("shared")
    if not (Path(sys.prefix) / "bin" / "activate").exists():
        pytest.skip("Python is not that of a virtual environment")
    (path / ".venv").symlink_to(sys.prefix)
    (path / "examples").symlink_to(ROOT / "examples")
    return path


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Slurm]:
    if reason := why_no_slurm() or why_not():
        pytest.skip(reason)
    with Lab(HOSTS, "1gbit", shared=[folder]) as lab, Slurm(lab) as slurm:
        yield slurm


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    yield cluster
    if cluster.lab.pids:
        run(cluster, "scancel", "--user=root")
        assert until(lambda: not left_on(cluster)), left_on(cluster)


@pytest.fixture(params=["pmi2", "pmix"])
def mpi(request: pytest.FixtureRequest, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let jobs use MPICH (pmi2), then Open MPI (pmix)."""
    if request.param == "pmix":
        try:
            ctypes.CDLL(OPEN_MPI["MPI4PY_LIBMPI"])
        except OSError:
            pytest.skip("there is no Open MPI; benchmarks/netlab/install.sh installs it")
        listed = slurm.run(["srun", "--mpi=list"])
        if "pmix" not in listed.stdout + listed.stderr:
            pytest.skip("this Slurm has no PMIx")
        for name, value in OPEN_MPI.items():
            monkeypatch.setenv(name, value)
    return str(request.param)


def run(slurm: Slurm, *command: str | Path, timeout: float = 200) -> str:
    """Run a command that ends well, and return its output."""
    env = environment({"OMP_NUM_THREADS": THREADS, **slurm.environment})
    done = slurm.run(command, timeout=timeout, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(slurm: Slurm, folder: Path, script: str, *arguments: str, options: str = "") -> str:
    """Submit a script, which begins in the shared folder; return the job's number."""
    file = folder / "job.sh"
    file.write_text(script)
    where = f"--chdir={folder}", f"--output={folder}/%j.out"
    return run(slurm, "sbatch", "--parsable", *where, *options.split(), file, *arguments).strip()


def output(folder: Path, number: str) -> str:
    return (folder / f"{number}.out").read_text()


def example(name: str) -> str:
    """Return a script of examples/cluster."""
    return (ROOT / "examples" / "cluster" / name).read_text()


def outline(text: str) -> list[str]:
    """Return the lines of an output without numbers, which vary, and spaces."""
    text = re.sub(r"[\d.,]+(e-\d+)?", "N", text).replace(" core ", " cores ")
    return [" ".join(line.split()) for line in text.splitlines()]


def labels(text: str) -> list[str]:
    """Return the labels of doctor's lines."""
    return re.findall(r"^  (\S+) ", text, re.M)


def shown(command: str) -> str:
    """Return what docs/first-job.md shows after a command."""
    page = (ROOT / "docs" / "first-job.md").read_text()
    return page.split(f"$ {command}\n")[1].split("```")[0].split("$ ")[0]


def ranks_on(slurm: Slurm, host: int) -> list[str]:
    """Return the process ids of the ranks on a host, as the host counts them."""
    listed = slurm.lab.run(host, ["ps", "-wweo", "pid=,args="]).stdout.splitlines()
    return [
        line.split()[0]
        for line in listed
        if line.split()[1:][-1:] == ["1000000"] and "srun" not in line
    ]


def computing(slurm: Slurm, ranks: int = 2) -> bool:
    """Return whether all ranks have been started, so many on each host, and are watched."""
    return all(
        sum(") died" in line for line in slurm.processes(host)) == ranks
        for host in range(slurm.lab.hosts)
    )


def left_on(slurm: Slurm) -> list[str]:
    """Return what jobs have left on the nodes: processes, and files in /dev/shm."""
    hosts = range(slurm.lab.hosts)
    files = [name for i in hosts for name in slurm.lab.run(i, ["ls", "/dev/shm"]).stdout.split()]
    return [*files, *(line for i in hosts for line in slurm.processes(i))]


def test_missing_slurm_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.netlab.slurm.PATH", "")
    with (
        pytest.raises(LabError, match=r"munged, .*not installed.*install\.sh"),
        Slurm(Lab(1, "1gbit")),
    ):
        pass


def test_slurm_ends_with_its_maker(slurm: Slurm) -> None:
    hold = "\n".join(
        [
            "import os, sys",
            "from benchmarks.netlab.lab import Lab",
            "from benchmarks.netlab.slurm import Slurm",
            "with Lab(2, '1gbit') as lab, Slurm(lab) as slurm:",
            "    print(*(os.readlink(f'/proc/{pid}/ns/pid') for pid in lab.pids), flush=True)",
            "    slurm.run(['srun', '--nodes=2', 'sleep', '100'])",
        ]
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, env=environment()
    ) as maker:
        try:
            assert maker.stdout is not None
            of_lab = {*maker.stdout.readline().split()}
            assert len(of_lab) == 1 + HOSTS
            assert until(lambda: len(commands_in(of_lab, "sleep")) == HOSTS)
            assert len(commands_in(of_lab, "slurmd")) == HOSTS
        finally:
            maker.kill()
    assert until(lambda: not commands_in(of_lab)), commands_in(of_lab)


def commands_in(namespaces: set[str], name: str = "") -> list[str]:
    """Return the processes of PID namespaces whose name begins so."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "comm").read_text().strip()
            if os.readlink(process / "ns" / "pid") in namespaces and command.startswith(name):
                found.append(command)
    return found


def test_script_for_mpi(slurm: Slurm, folder: Path, mpi: str) -> None:
    script = example("mpi.sbatch")
    assert "--mpi=pmi2 " in script
    number = submit(slurm, folder, script.replace("--mpi=pmi2 ", f"--mpi={mpi} "))
    job, out = slurm.wait(number), output(folder, number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), out
    assert ("Open MPI" if mpi == "pmix" else "MPICH") in out
    assert "4 on 2 hosts" in out
    assert "no problems found" in out
    assert re.findall(r"^ +\d  (host\d)", out, re.M) == ["host0", "host0", "host1", "host1"]
    assert "all checks passed" in out
    # What stands behind doctor's labels depends on the machine; `run` prints the same on all.
    (doctor, report), (said, reported) = (
        text.split("LV-XAttn run\n") for text in (shown("cat slurm-1.out"), out)
    )
    assert labels(doctor) == labels(said)
    assert outline(report) == outline(reported)


def test_four_nodes(folder: Path, slurm: Slurm) -> None:
    with Lab(4, "1gbit", shared=[folder]) as lab, Slurm(lab) as four:
        over = ["srun", "--nodes=4", "--ntasks-per-node=1", "--mpi=pmi2", sys.executable]
        out = run(four, *over, "-m", "mpi4py", "-m", "lvxattn.mpi_impl", "run", "--check")
        assert re.findall(r"^ +\d  (host\d)", out, re.M) == [f"host{i}" for i in range(4)]
        assert "all checks passed" in out
        script = f"#!/bin/bash\nsrun --mpi=pmi2 {' '.join([sys.executable, *FOREVER])}\n"
        options = f"--nodes=4 --ntasks-per-node=1 --job-name=four --error={folder}/four.err"
        number = submit(four, folder, script, options=options)
        assert until(lambda: computing(four, 1), START), output(folder, number)
        lab.run(3, ["kill", "-KILL", *ranks_on(four, 3)])
        assert four.wait(number, START)["JobState"] == "FAILED"
        said = (folder / "four.err").read_text()
        assert re.search(r"rank 3 of 4 \(process \d+ on host3\) died", said), said
        assert until(lambda: not left_on(four)), left_on(four)


TABLE = "#!/bin/sh\npython3 examples/cluster/table.py\n"


def after(number: str) -> str:
    return f"--dependency=afterok:{number} --kill-on-invalid-dep=yes"


def test_array_makes_a_table(slurm: Slurm, folder: Path) -> None:
    small = "--text-tokens", "64"
    array = submit(slurm, folder, example("array.sbatch"), *small)
    number = submit(slurm, folder, TABLE, options=after(array))
    assert slurm.wait(number, patience=200)["JobState"] == "COMPLETED", output(folder, number)
    written = [json.loads(file.read_text()) for file in (folder / "sizes").iterdir()]
    sent = {run["totals"]["keys"]: run["totals"]["bytes"] / 1e6 for run in written}
    assert sorted(sent) == [4096, 8192, 16384, 32768]
    rows = re.findall(r"^\| ([\d,]+) \| 4 \| 2 \| [\d.]+ \| ([\d.]+) \| passed \|$",
                      output(folder, number), re.M)  # fmt: skip
    assert rows == [(f"{keys:,}", f"{sent[keys]:.2f}") for keys in sorted(sent)]
    assert outline(shown("cat slurm-3.out")) == outline(output(folder, number))


def test_table_is_not_made_of_failed_tasks(slurm: Slurm, folder: Path) -> None:
    array = submit(slurm, folder, example("array.sbatch"), "--heads", "none")
    number = submit(slurm, folder, TABLE, options=after(array))
    assert slurm.wait(number)["JobState"] == "CANCELLED"


def test_script_for_gpus_can_be_scheduled(slurm: Slurm, folder: Path) -> None:
    script = example("gpu.sbatch")
    (folder / "gpu.sh").write_text(script)
    assert slurm.run(["sbatch", "--test-only", folder / "gpu.sh"]).returncode == 0
    (folder / "gpu.sh").write_text(script.replace("gpus-per-node=4", "gpus-per-node=5"))
    assert slurm.run(["sbatch", "--test-only", folder / "gpu.sh"]).returncode != 0


def test_ranks_of_a_host_are_given_different_gpus(slurm: Slurm) -> None:
    show = ["sh", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES"]
    for options, visible in ([], ""), (["--gpus-per-task=1"], "01"), (["--gpus-per-node=1"], "00"):
        out = run(slurm, "srun", "--nodes=2", "--ntasks-per-node=2", *options, *show)
        expected = [[f"host{i}", *gpu] for i in range(HOSTS) for gpu in visible or ["", ""]]
        assert sorted(map(str.split, out.splitlines())) == expected


BY_HAND = ["sh", "-c", 'CUDA_VISIBLE_DEVICES=$SLURM_LOCALID exec "$0" "$@"']


@pytest.mark.parametrize(
    ("options", "by_hand", "taken"),
    [
        (["--gpus-per-task=1"], [], "01"),
        (["--gpus-per-node=2"], [], "01"),  # each rank sees both
        (["--gpus-per-node=1"], [], "00"),
        ([], BY_HAND, "01"),
    ],
    ids=["task", "node", "shared", "by hand"],
)
def test_gpu_that_a_rank_takes(
    slurm: Slurm, options: list[str], by_hand: list[str], taken: str
) -> None:
    program = sys.executable, "-m", "mpi4py", PROGRAMS / "slurm_device.py"
    out = run(slurm, "srun", *ON_ALL, *options, *by_hand, *program)
    assert sorted(out.split("\n")[:-1]) == [f"host{i} {gpu}" for i in range(HOSTS) for gpu in taken]


@pytest.mark.parametrize("option", ["", "--kill-on-bad-exit"], ids=["plain", "kill-on-bad-exit"])
def test_killed_rank_ends_the_job(slurm: Slurm, folder: Path, mpi: str, option: str) -> None:
    python = " ".join([sys.executable, *FOREVER])
    script = f"#!/bin/bash\nsrun --mpi={mpi} {option} {python}\n"
    number = submit(slurm, folder, script, options="--nodes=2 --ntasks-per-node=2")
    assert until(lambda: computing(slurm), START), output(folder, number)
    slurm.lab.run(1, ["kill", "-KILL", ranks_on(slurm, 1)[0]])
    job = slurm.wait(number, START)
    assert job["JobState"] == "FAILED"
    assert job["ExitCode"] != "0:0"
    out = output(folder, number)
    assert re.search(r"rank [23] of 4 \(process \d+ on host1\) died", out), out
    assert until(lambda: not left_on(slurm)), left_on(slurm)


def eat(slurm: Slurm, folder: Path, options: str) -> str:
    """Submit a job whose last rank needs more and more memory once there is a file `hungry`."""
    (folder / "hungry").unlink(missing_ok=True)
    program = PROGRAMS / "eat_memory.py", folder / "hungry"
    command = " ".join(map(str, ("srun --mpi=pmi2", sys.executable, "-m mpi4py", *program)))
    options = f"--nodes=2 --ntasks-per-node=2 {options}"
    return submit(slurm, folder, f"#!/bin/bash\n{command}\n", options=options)


def test_job_ends_at_its_memory_limit(slurm: Slurm, folder: Path) -> None:
    """Slurm ends all of the step at once, and names the host."""
    number = eat(slurm, folder, "--mem=1000")
    assert until(lambda: computing(slurm), START), output(folder, number)
    (folder / "hungry").touch()
    job, out = slurm.wait(number), output(folder, number)
    # 22.05 says that it failed; others may say why.
    assert job["JobState"] in ("FAILED", "OUT_OF_MEMORY"), out
    assert job["ExitCode"] != "0:0", out
    assert re.search(r"slurmstepd-host1: error: StepId=\S+ exceeded memory limit", out), out
    assert until(lambda: not left_on(slurm)), left_on(slurm)


def make_limited() -> Path | None:
    """Make a cgroup, of version 1 or 2, that may use 300 MB; return None where one cannot."""
    for folder, name in ("memory", "memory.limit_in_bytes"), ("", "memory.max"):
        group = Path("/sys/fs/cgroup", folder, f"lvxattn-test-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            if (group / name).exists():
                (group / name).write_text(str(300 * 10**6))
                for swap in ("memory.swappiness", "memory.swap.max"):
                    if (group / swap).exists():
                        (group / swap).write_text("0")
                return group
            group.rmdir()
    return None


@pytest.fixture
def limited() -> Iterator[Path]:
    group = make_limited()
    if group is None:
        pytest.skip("no cgroup that limits memory can be made here")
    yield group
    assert until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_rank_that_the_kernel_kills_for_memory_is_named(
    slurm: Slurm, folder: Path, limited: Path
) -> None:
    """As where Slurm limits memory by cgroups; those of the lab's hosts would be the machine's."""
    number = eat(slurm, folder, "--mem=16000")
    assert until(lambda: computing(slurm), START), output(folder, number)
    (watch,) = [line for line in slurm.processes(1) if "rank 3 of 4" in line]
    found = re.search(r"process (\d+) on host1", watch)
    assert found is not None
    # On the host, whose processes have their own numbers.
    slurm.lab.run(1, ["sh", "-c", f"echo {found[1]} > {limited}/cgroup.procs"])
    assert (limited / "cgroup.procs").read_text()
    (folder / "hungry").touch()
    job, out = slurm.wait(number), output(folder, number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "137:0"), out
    assert re.search(rf"rank 3 of 4 \(process {found[1]} on host1\) died", out), out
    assert until(lambda: not left_on(slurm)), left_on(slurm)


def test_job_ends_at_its_time_limit(slurm: Slurm, folder: Path) -> None:
    python = " ".join([sys.executable, *FOREVER])
    limits = "--nodes=2 --ntasks-per-node=2 --time=00:10:00"
    number = submit(slurm, folder, f"#!/bin/bash\nsrun --mpi=pmi2 {python}\n", options=limits)
    assert until(lambda: computing(slurm), START), output(folder, number)
    run(slurm, "scontrol", "update", f"JobId={number}", "TimeLimit=1")  # minute
    job = slurm.wait(number, 2 * START)
    assert job["JobState"] == "TIMEOUT"
    assert "DUE TO TIME LIMIT" in output(folder, number)
    assert until(lambda: not left_on(slurm)), left_on(slurm)


def test_drained_node_is_not_used(slurm: Slurm, folder: Path) -> None:
    script = "#!/bin/bash\nsrun hostname\n"
    run(slurm, "scontrol", "update", "NodeName=host0", "State=DRAIN", "Reason=test")
    try:
        # What an earlier job has not quite left is "draining" first.
        assert until(lambda: slurm.states() == ["drained", "idle"]), slurm.states()
        small = [submit(slurm, folder, script, options="--ntasks=1") for _ in range(2)]
        large = submit(slurm, folder, script, options="--nodes=2")
        for number in small:
            assert slurm.wait(number)["JobState"] == "COMPLETED"
            assert output(folder, number) == "host1\n"
        assert slurm.job(large)["JobState"] == "PENDING"
    finally:
        run(slurm, "scontrol", "update", "NodeName=host0", "State=RESUME")
    assert slurm.wait(large)["JobState"] == "COMPLETED"
    assert sorted(output(folder, large).split()) == ["host0", "host1"]


def test_requeued_training_resumes(slurm: Slurm, folder: Path) -> None:
    pytest.importorskip("torch")
    small = ["--frames=9", "--first-frames=3", "--batch=2", "--checkpoint-every=10", "--steps=30"]
    number = submit(slurm, folder, example("torchrun.sbatch"), *small)
    checkpoint = folder / "train-run" / "checkpoint"
    assert until(checkpoint.exists, 120), output(folder, number)
    run(slurm, "scontrol", "requeue", number)
    assert until(lambda: slurm.job(number)["JobState"] == "PENDING", 30)
    run(slurm, "scontrol", "update", f"JobId={number}", "StartTime=now")
    job, out = slurm.wait(number, patience=200), output(folder, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), out
    with (folder / "train-run" / "curve.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [*range(1, 31)]
    resumed = re.search(r"resumed after step (\d+)", out)
    assert resumed is not None, out
    assert 10 <= int(resumed[1]) < 30

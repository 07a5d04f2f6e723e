"""Slurm on two hosts of a lab: the scripts of docs/clusters.md, and jobs that end badly."""

import csv
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
from tests.launch import ROOT, environment, until

HOSTS = 2
pytestmark = [pytest.mark.mpi, pytest.mark.slow]
# Ranks that compute until they are ended.
FOREVER = ["-m", "mpi4py", "-m", "lvxattn.mpi_impl", "run", "--quiet", "--repeat", "1000000"]
ON_ALL = ["--nodes=2", "--ntasks-per-node=2", "--mpi=pmi2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder that all hosts see, with an environment as the scripts expect it."""
    path = tmp_path_factory.mktemp("shared")
    if not (Path(sys.prefix) / "bin" / "activate").exists():
        pytest.skip("Python is not that of a virtual environment")
    (path / ".venv").symlink_to(sys.prefix)
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


def run(slurm: Slurm, *command: str | Path, timeout: float = 200) -> str:
    """Run a command that ends well, and return its output."""
    done = slurm.run(command, timeout=timeout, env={**environment(), **slurm.environment})
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


def documented(name: str) -> str:
    """Return a script of docs/clusters.md by the name of its job."""
    scripts = re.findall(
        r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs/clusters.md").read_text(), re.S
    )
    return next(text for text in scripts if f"--job-name={name}\n" in text)


def ranks_on(slurm: Slurm, host: int) -> list[str]:
    """Return the process ids of the ranks on a host, as the host counts them."""
    listed = slurm.lab.run(host, ["ps", "-eo", "pid=,args="]).stdout.splitlines()
    return [
        line.split()[0]
        for line in listed
        if line.split()[1:][-1:] == ["1000000"] and "srun" not in line
    ]


def computing(slurm: Slurm) -> bool:
    """Return whether all ranks have been started, and watch one another."""
    return all(
        sum(") died" in line for line in slurm.processes(host)) == 2 for host in range(HOSTS)
    )


def left_on(slurm: Slurm) -> list[str]:
    """Return what jobs have left on the nodes: processes, and files in /dev/shm."""
    hosts = range(HOSTS)
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


def test_check_over_two_nodes(slurm: Slurm) -> None:
    program = ["-m", "mpi4py", "-m", "lvxattn.mpi_impl", "run", "--check"]
    out = run(slurm, "srun", *ON_ALL, sys.executable, *program)
    assert re.findall(r"^ +\d  (host\d)", out, re.M) == ["host0", "host0", "host1", "host1"]
    assert "all checks passed" in out


def test_documented_script(slurm: Slurm, folder: Path) -> None:
    number = submit(slurm, folder, documented("lvxattn-check"))
    job, out = slurm.wait(number), output(folder, number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), out
    assert "4 on 2 hosts" in out
    assert "no problems found" in out
    assert "all checks passed" in out


def test_documented_gpu_script_can_be_scheduled(slurm: Slurm, folder: Path) -> None:
    script = documented("lvxattn-gpu")
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


@pytest.mark.parametrize("start", ["srun --kill-on-bad-exit", "LVXATTN_TIMEOUT=8 srun"])
def test_killed_rank_ends_the_job(slurm: Slurm, folder: Path, start: str) -> None:
    python = " ".join([sys.executable, *FOREVER])
    command = f"{start} --mpi=pmi2 {python}"
    number = submit(
        slurm, folder, f"#!/bin/bash\n{command}\n", options="--nodes=2 --ntasks-per-node=2"
    )
    assert until(lambda: computing(slurm), 60), output(folder, number)
    slurm.lab.run(1, ["kill", "-KILL", ranks_on(slurm, 1)[0]])
    job = slurm.wait(number, patience=30)
    assert job["JobState"] == "FAILED"
    assert job["ExitCode"] != "0:0"
    out = output(folder, number)
    assert re.search(r"rank [23] of 4 \(process \d+ on host1\) died", out)
    assert until(lambda: not left_on(slurm)), left_on(slurm)


def test_job_ends_at_its_time_limit(slurm: Slurm, folder: Path) -> None:
    python = " ".join([sys.executable, *FOREVER])
    limits = "--nodes=2 --ntasks-per-node=2 --time=00:01:00"
    number = submit(slurm, folder, f"#!/bin/bash\nsrun --mpi=pmi2 {python}\n", options=limits)
    assert until(lambda: computing(slurm), 50), output(folder, number)
    job = slurm.wait(number, patience=150)
    assert job["JobState"] == "TIMEOUT"
    assert "DUE TO TIME LIMIT" in output(folder, number)
    assert until(lambda: not left_on(slurm)), left_on(slurm)


def test_drained_node_is_not_used(slurm: Slurm, folder: Path) -> None:
    script = "#!/bin/bash\nsrun hostname\n"
    run(slurm, "scontrol", "update", "NodeName=host0", "State=DRAIN", "Reason=test")
    try:
        assert slurm.states() == ["drained", "idle"]
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
    number = submit(slurm, folder, documented("lvxattn-train"), *small)
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

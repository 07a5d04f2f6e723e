"""The cluster of shaped links: rates, counters, placement, and cleaning up."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from benchmarks.netlab.lab import Lab, why_not
from tests.launch import PROGRAMS, ROOT

NETLAB = ROOT / "benchmarks" / "netlab"
pytestmark = pytest.mark.mpi
needs_lab = pytest.mark.usefixtures("_lab_can_be_built")
ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def _lab_can_be_built() -> None:
    if reason := why_not():
        pytest.skip(f"no lab here: {reason}")


def output(lab: Lab, program: str, *args: object) -> str:
    """Return the output of a program of tests/programs on the ranks of a lab."""
    command = [sys.executable, "-m", "mpi4py", str(PROGRAMS / program), *map(str, args)]
    done = lab.mpiexec(command, timeout=100, env=ENV)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def count_bytes(
    hosts: int, rate: str, ranks_per_host: int, placement: str, S_Q: int
) -> tuple[list[tuple[str, int, str]], list[int]]:
    """Return the ranks' report, and the links' counters."""
    with Lab(hosts, rate, ranks_per_host, placement) as lab:
        return json.loads(output(lab, "count_bytes.py", S_Q, 768)), lab.bytes_sent()


@needs_lab
@pytest.mark.parametrize(("rate", "nbytes"), [("50mbit", 2**18), ("1gbit", 2**23)])
def test_block_after_idling_takes_size_over_rate(rate: str, nbytes: int) -> None:
    with Lab(hosts=2, rate=rate) as lab:
        for _ in range(3):  # a busy machine may add time
            ratios = output(lab, "send_block.py", nbytes, lab.bits_per_second, 9).split()
            typical = median(map(float, ratios[1:]))
            if typical == pytest.approx(1, rel=0.10):
                break
    assert typical == pytest.approx(1, rel=0.10)


@needs_lab
@pytest.mark.parametrize(
    ("hosts", "rate", "ranks_per_host", "placement", "S_Q"),
    [
        (2, "50mbit", 1, "block", 1024),
        (3, "1gbit", 1, "block", 6144),
        (2, "1gbit", 2, "block", 6144),
        (2, "1gbit", 2, "cyclic", 6144),
    ],
)
def test_link_counters_see_what_the_meter_counts(
    hosts: int, rate: str, ranks_per_host: int, placement: str, S_Q: int
) -> None:
    report, link = count_bytes(hosts, rate, ranks_per_host, placement, S_Q)
    counted = Counter({host: 0 for host, _, _ in report})
    for host, nbytes, right in report:
        counted[host] += nbytes * (host != right)
    assert link == pytest.approx([counted[f"host{i}"] for i in range(hosts)], rel=0.03)


@needs_lab
def test_placement_of_ranks_does_not_change_what_leaves_a_host() -> None:
    sent = {}
    for placement in ("block", "cyclic"):
        report, sent[placement] = count_bytes(2, "1gbit", 2, placement, 6144)
        hosts = [host for host, _, _ in report]
        together = ["host0", "host0", "host1", "host1"]
        assert hosts == (together if placement == "block" else ["host0", "host1"] * 2)
    assert sent["cyclic"] == pytest.approx(sent["block"], rel=0.03)


@needs_lab
def test_two_labs_are_isolated() -> None:
    with Lab(hosts=2, rate="1gbit") as first, Lab(hosts=2, rate="1gbit") as second:
        before = second.bytes_sent()
        output(first, "send_block.py", 2**20, 1e9, 1)
        assert sum(second.bytes_sent()) - sum(before) < 10_000
        output(second, "send_block.py", 2**20, 1e9, 1)


@needs_lab
def test_hosts_have_their_own_files_and_processes_and_know_their_names() -> None:
    leave = "touch /tmp/$0 /dev/shm/$0; sleep 60 >/dev/null 2>&1 & ls /tmp /dev/shm; ps axww"
    with Lab(hosts=2, rate="1gbit") as lab:
        seen = [lab.run(i, ["sh", "-c", leave, f"of-{i}"], timeout=30).stdout for i in (0, 1)]
        named = lab.run(0, ["getent", "hosts", "host1"], timeout=30).stdout.split()
    for i, text in enumerate(seen):
        files, _, processes = text.partition("PID")
        assert files.split().count(f"of-{i}") == 2
        assert f"of-{1 - i}" not in files
        assert sum(line.endswith(" sleep 60") for line in processes.splitlines()) == 1
        assert processes.count("holder.py") == 1
    assert named == ["10.77.0.2", "host1"]
    assert not Path("/tmp/of-0").exists()


@needs_lab
def test_hosts_have_their_own_links_and_rates() -> None:
    show = "hostname; readlink /proc/self/ns/ipc; tc qdisc show dev e0"
    with Lab(hosts=2, rate=["1gbit", "50mbit"]) as lab:
        seen = [lab.run(i, ["sh", "-c", show], timeout=30).stdout.splitlines() for i in (0, 1)]
        assert lab.bits_per_second == 5e7
    assert [lines[0] for lines in seen] == ["host0", "host1"]
    assert len({os.readlink("/proc/self/ns/ipc"), *(lines[1] for lines in seen)}) == 3
    assert ["rate 1Gbit" in seen[0][2], "rate 50Mbit" in seen[1][2]] == [True, True]
    with pytest.raises(ValueError, match="rate: expected one, or one for each of 3 hosts"):
        Lab(hosts=3, rate=["1gbit", "50mbit"])


@needs_lab
def test_command_line_runs_one_command_on_a_host() -> None:
    netlab = [sys.executable, NETLAB, "--hosts", "2"]
    done = run([*netlab, "--on", "1", "--", "sh", "-c", "hostname; exit 3"])
    assert (done.returncode, done.stdout) == (3, "host1\n")
    done = run([*netlab, "--on", "2", "--", "hostname"])
    assert done.returncode == 2
    assert done.stderr == "netlab: --on: expected 0 to 1, got 2\n"


@needs_lab
def test_command_on_a_host_keeps_folder_status_and_environment(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("of this machine\n")
    with Lab(hosts=1, rate="1gbit", shared=[tmp_path]) as lab:
        command = ["sh", "-c", f"pwd; echo $WORD; cat {text}; echo written >> {text}; exit 3"]
        done = lab.run(0, command, timeout=30, env={"WORD": "given"})
        assert done.returncode == 3
        assert done.stdout.splitlines() == [os.getcwd(), "given", "of this machine"]
        with pytest.raises(subprocess.TimeoutExpired):
            lab.run(0, ["sleep", "60"], timeout=0.5)
        assert not lab.pids  # it was closed
    assert text.read_text() == "of this machine\nwritten\n"


@needs_lab
def test_unprivileged_user_namespace_is_enough() -> None:
    drop = ["setpriv", "--bounding-set", "-sys_admin,-net_admin", "--inh-caps", "-all"]
    as_user: list[str | Path] = list(drop) if os.geteuid() == 0 else []
    if run([*as_user, "unshare", "--user", "--map-root-user", "--net", "ip", "link"]).returncode:
        pytest.skip("no unprivileged user namespaces here")
    # One write: ranks share a pipe.
    program = "import os, socket; os.write(1, socket.gethostname().encode() + bytes([10]))"
    echo = [sys.executable, "-c", program]
    done = run([*as_user, sys.executable, NETLAB, "--hosts", "2", "--", *echo])
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["host0", "host1"]), done.stderr


@needs_lab
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("normally", None),
        ("by-exception", None),
        ("when-killed", signal.SIGINT),
        ("when-killed", signal.SIGTERM),
        ("when-killed", signal.SIGKILL),
    ],
)
def test_leaves_nothing_behind(how: str, number: signal.Signals | None) -> None:
    name, links = socket.gethostname(), Path("/proc/self/net/dev").read_text().count(":")
    with subprocess.Popen(
        [sys.executable, PROGRAMS / "hold_lab.py", how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENV},
    ) as process:
        assert process.stdout is not None
        try:
            namespaces = set(process.stdout.readline().split())
            assert len(namespaces) == 3
            assert [process.stdout.readline() for _ in range(2)] == ["awake\n"] * 2
            assert namespaces <= set(namespaces_in_use())
            if number:
                process.send_signal(number)
            _, err = process.communicate(timeout=60)  # closes its input
        finally:
            process.kill()
    assert ("to be seen outside" in err) == (how == "by-exception"), err

    deadline = time.monotonic() + 30
    while (left := namespaces & set(namespaces_in_use())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert socket.gethostname() == name
    assert Path("/proc/self/net/dev").read_text().count(":") == links


@pytest.mark.parametrize("tool", ["ip", "tc", "unshare", "nsenter"])
def test_missing_tool_is_named(tool: str, tmp_path: Path) -> None:
    for other in {"ip", "tc", "unshare", "nsenter"} - {tool}:
        (tmp_path / other).symlink_to("/bin/true")
    done = run([sys.executable, NETLAB, "--", "true"], PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"netlab: {tool} is not on PATH")


def test_missing_privileges_are_named(tmp_path: Path) -> None:
    for tool in ("ip", "tc", "nsenter"):
        (tmp_path / tool).symlink_to("/bin/true")
    mpiexec = stand_in(tmp_path / "mpiexec", "echo HYDRA")
    stand_in(tmp_path / "unshare", "echo unshare: no >&2; exit 1")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run([sys.executable, NETLAB, "--", "true"], PATH=path, LVXATTN_MPIEXEC=mpiexec)
    assert (done.returncode, done.stdout) == (2, "")
    assert "root or unprivileged user namespaces" in done.stderr
    assert "unshare: no" in done.stderr


def test_launcher_of_another_mpi_is_refused(tmp_path: Path) -> None:
    mpiexec = stand_in(tmp_path / "mpiexec", "echo mpiexec of another kind")
    done = run([sys.executable, NETLAB, "--", "true"], LVXATTN_MPIEXEC=mpiexec)
    assert done.returncode == 2
    assert "is not MPICH's" in done.stderr


def stand_in(path: Path, script: str) -> str:
    """Write a shell script that stands in for a program, and return its path."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def run(command: list[str | Path], **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a command with some of the environment changed."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, **env}, check=False
    )


def namespaces_in_use() -> Iterator[str]:
    """Yield the network namespace of every process."""
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            yield os.readlink(process)
        except OSError:
            continue

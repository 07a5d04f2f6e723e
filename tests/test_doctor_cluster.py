"""The doctor of both implementations on two hosts of a lab: each fault is planted and found."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from benchmarks.netlab.lab import Lab, why_not
from tests.launch import environment, until

pytestmark = [pytest.mark.mpi, pytest.mark.slow]
MPI_DOCTOR = [sys.executable, "-m", "mpi4py", "-m", "lvxattn.mpi_impl", "doctor"]
TORCH_DOCTOR = [sys.executable, "-m", "lvxattn.torch_impl", "doctor"]
BOTH = pytest.mark.parametrize("implementation", ["mpi_impl", "torch_impl"])
IPTABLES = shutil.which("iptables", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
CORES = str(len(os.sched_getaffinity(0)))
# What a firewall lets through: MPICH's launcher, and the store of PyTorch.
OPEN = {"MPIEXEC_PORT_RANGE": "20000:20100", "MASTER_PORT": "20000"}
# Advice on the machine that the lab is on, which has nothing to do with what is planted.
MACHINE = re.compile(
    r"host\d: (/dev/shm has|at most .* locked memory|there are GPUs|CuPy finds|PyTorch finds|MPI "
    r"does not take device memory)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def lab(folder: Path) -> Iterator[Lab]:
    if reason := why_not():
        pytest.skip(f"no lab here: {reason}")
    with Lab(2, "1gbit", shared=[folder]) as lab:
        yield lab


def doctor(
    lab: Lab, implementation: str, on_host1: str = "", **env: str
) -> "subprocess.CompletedProcess[str]":
    """Run the doctor on a rank of each host, after a shell's command on host 1."""
    shell = f'if [ "$(hostname)" = host1 ]; then :; {on_host1}\nfi; exec "$0" "$@"'
    changes: dict[str, str | None] = {**OPEN, "OMP_NUM_THREADS": CORES, "LVXATTN_TIMEOUT": "60"}
    variables = environment(changes | env)
    if implementation == "mpi_impl":
        return lab.mpiexec(["sh", "-c", shell, *MPI_DOCTOR], timeout=200, env=variables)
    pytest.importorskip("torch")
    variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "host0", "LOCAL_RANK": "0"}
    return on_both(lab, ["sh", "-c", shell, *TORCH_DOCTOR], variables)


def on_both(
    lab: Lab, command: list[str], variables: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a command on both hosts, with PyTorch's rank; only host 0 prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [
        lab.start(host, command, env={**os.environ, **variables, "RANK": str(host)}, **pipes)
        for host in range(lab.hosts)
    ]
    try:
        said = [process.communicate(timeout=200) for process in started]
    except subprocess.TimeoutExpired:
        lab.close()  # ends the processes on the hosts
        raise
    assert said[1][0] == "", said[1]
    out, err = ("".join(texts) for texts in zip(*said, strict=True))
    return subprocess.CompletedProcess([], max(p.returncode for p in started), out, err)


def advice(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """Return the problems of a report; none is fatal."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR" not in done.stdout, done.stdout
    found = re.findall(r"^  advice: (.*)$", done.stdout, re.M)
    assert bool(found) == ("no problems found" not in done.stdout), done.stdout
    return found


def examined(lab: Lab, implementation: str, on_host1: str = "") -> tuple[str, list[str]]:
    """Return a report and its advice; of a second run, if a busy machine makes a link slow."""
    for _ in range(2):
        done = doctor(lab, implementation, on_host1)
        found = advice(done)
        if not any(text.startswith("the link from") for text in found):
            break
    return done.stdout, found


def others(found: list[str]) -> list[str]:
    """Return advice that is not about the machine that the lab is on."""
    return [text for text in found if not MACHINE.match(text)]


@contextmanager
def planted(lab: Lab, command: str, undo: str) -> Iterator[None]:
    """Run a command on host 1, and in the end what undoes it."""
    done = lab.run(1, ["sh", "-c", command], timeout=30)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        if lab.pids:
            lab.run(1, ["sh", "-c", undo], timeout=30)


@contextmanager
def firewall(lab: Lab, action: str) -> Iterator[None]:
    """Close host 1's ports, and its way to those of others, but for `OPEN`."""
    if IPTABLES is None:
        pytest.skip("iptables is not installed; benchmarks/netlab/install.sh installs it")
    add, undo = (
        " && ".join(
            f"{IPTABLES} {how} {way} e0 -p tcp --syn ! --dport 20000:20100 -j {action}"
            for way in ("INPUT -i", "OUTPUT -o")
        )
        for how in ("-A", "-D")
    )
    with planted(lab, add, undo):
        yield


@BOTH
def test_sound_hosts(lab: Lab, implementation: str) -> None:
    report, found = examined(lab, implementation)
    assert "ranks       2 on 2 hosts" in report
    assert "host1: 1 rank, " in report
    assert "e0 10.77.0.2" in report
    assert "between hosts, 2 links" in report
    clocks = re.search(r"clocks +at most (\S+) ms from host0's, measured to (\S+)$", report, re.M)
    assert clocks, report
    assert float(clocks[1]) <= float(clocks[2]) + 0.02  # they are one clock
    assert others(found) == []


@pytest.mark.parametrize("closed", [False, True])
def test_torchrun_over_two_hosts(lab: Lab, closed: bool) -> None:
    pytest.importorskip("torch")
    options = "--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=host0:20000"
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    timeout = {"LVXATTN_TIMEOUT": "10" if closed else "60"}
    with firewall(lab, "REJECT") if closed else nullcontext():
        done = on_both(lab, [*torchrun, "-m", *TORCH_DOCTOR[2:]], environment(timeout))
    if closed:
        assert done.returncode == 1
        assert re.search(
            r"ERROR: ranks \[1\] did not connect within 10 s: were they started, .* can their "
            r"hosts connect to host0:\d+ \(MASTER_ADDR, MASTER_PORT\)\?",
            done.stdout,
        ), done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ranks       2 on 2 hosts" in done.stdout
        assert "launcher    torchrun or its like: WORLD_SIZE=2" in done.stdout
        assert "between hosts, 2 links" in done.stdout


@BOTH
def test_host_that_differs_is_named(lab: Lab, folder: Path, implementation: str) -> None:
    (folder / "sitecustomize.py").write_text(
        "import platform, time, numpy\n"
        "platform.python_version = lambda: '3.0.7'\n"
        "numpy.__version__ = '1.0.7'\n"
        "now = time.time\n"
        "time.time = lambda: now() - 90\n"
    )
    core = min(os.sched_getaffinity(0))
    differ = (
        f"export PYTHONPATH={folder}:$PYTHONPATH; ulimit -n 100; cd /tmp; "
        f'taskset -c {core} "$0" "$@"; exit'
    )
    with planted(lab, "mount -t tmpfs -o size=64m tmpfs /dev/shm", "umount /dev/shm"):
        _, found = examined(lab, implementation, differ)
    expected = [
        r"ranks use different versions of Python: 3\.\S+ on host0; 3\.0\.7 on host1: use one",
        r"ranks use different versions of NumPy: \S+ on host0; 1\.0\.7 on host1: use one",
        r"host1's clock is 90 s behind host0's: synchronize them \(chronyd",
        r"host1 \(in /tmp\) does not see host0's current folder, /\S+: start in",
        r"host1: /dev/shm has 64 MiB, 6\d MiB free, .*--shm-size",
        r"host1: at most 100 open files \(ulimit -n\).* nofile 65536.*PropagateResourceLimits",
    ]
    if int(CORES) > 1:
        expected += [
            rf"a rank has 1 core on host1, {CORES} on host0: all wait for the slowest",
            rf"host1: 1 rank bound to 1 of {CORES} cores, most are idle: give each",
        ]
    for pattern in expected:
        assert sum(re.match(pattern, text) is not None for text in found) == 1, (pattern, found)
    rest = [text for text in found if not any(re.match(pattern, text) for pattern in expected)]
    assert others(rest) == []


@BOTH
def test_slow_link_is_named(lab: Lab, implementation: str) -> None:
    slow, fast = (f"tc qdisc change dev e0 root tbf rate {rate} burst {burst} latency 50ms"
                  for rate, burst in (("40mbit", 16000), ("1gbit", 125000)))  # fmt: skip
    with planted(lab, slow, fast):
        (found,) = others(advice(doctor(lab, implementation)))
    match = re.match(
        r"the link from rank 1 on host1 to rank 0 on host0 is (\d+) times slower than the median "
        r"of its kind: (0\.00\d+) GB/s",
        found,
    )
    assert match, found
    assert int(match[1]) > 4
    assert 0.001 < float(match[2]) < 0.006  # its rate is 0.005


def test_firewall_is_named_before_a_group_is_made(lab: Lab) -> None:
    with firewall(lab, "DROP"):
        done = doctor(lab, "torch_impl")
    assert done.returncode == 1, done.stdout + done.stderr
    for a, b in ((0, 1), (1, 0)):
        line = (
            rf"ERROR: rank {a} on host{a} \(e0 10\.77\.0\.{a + 1}\) cannot connect to rank {b} on "
            rf"host{b} at 10\.77\.0\.{b + 1}:\d+ \(e0\): no answer in 6 s; a firewall\? Let the "
            r"hosts connect .* ports \d+-\d+, or select .*: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        )
        assert re.search(line, done.stdout), done.stdout
    assert "Traceback" not in done.stderr


def test_ranks_of_a_host_wait_for_its_first(lab: Lab) -> None:
    pytest.importorskip("torch")
    # Less than connections are tried for; only the first rank of each host tries.
    variables = environment({**OPEN, "LVXATTN_TIMEOUT": "4"})
    torchrun = (
        'exec "$0" -m torch.distributed.run --nnodes=2 --node-rank=$RANK --nproc-per-node=2 '
        "--master-addr=host0 --master-port=20000 -m lvxattn.torch_impl doctor"
    )
    with firewall(lab, "DROP"):
        done = on_both(lab, ["sh", "-c", torchrun, sys.executable], variables)
    assert done.returncode == 1, done.stdout + done.stderr
    for a, b in ((0, 1), (1, 0)):
        line = rf"ERROR: rank {2 * a} on host{a} .* cannot connect to rank {2 * b} on host{b} at "
        assert re.search(line, done.stdout), done.stdout + done.stderr
    assert "init_process_group" not in done.stderr


def test_firewall_ends_ranks_of_mpi_and_names_the_network(lab: Lab) -> None:
    with firewall(lab, "DROP"):
        done = doctor(lab, "mpi_impl", "", LVXATTN_TIMEOUT="5")
    assert done.returncode != 0
    line = re.search(
        r"rank (\d) of 2 has waited 5 s for (the other ranks, for MPI to start|a first message "
        r"from rank \d)\. This is host(\d), with (.*)",
        done.stderr,
    )
    assert line, done.stderr
    assert line[1] == line[3]
    assert line[4].startswith(f"e0 10.77.0.{int(line[1]) + 1}. If other ranks are on other hosts")
    assert "FI_TCP_PORT_LOW_RANGE" in line[4]
    assert "FI_TCP_IFACE, UCX_NET_DEVICES, OMPI_MCA_btl_tcp_if_include" in line[4]
    assert "(now: FI_TCP_IFACE=e0)" in line[4]
    assert until(lambda: not left(lab)), left(lab)


def left(lab: Lab) -> list[str]:
    """Return what a run has left on the hosts: processes, and files of MPI."""
    hosts = range(lab.hosts)
    files = [name for i in hosts for name in lab.run(i, ["ls", "/dev/shm"]).stdout.split()]
    ps = [line for i in hosts for line in lab.run(i, ["ps", "-wweo", "args="]).stdout.splitlines()]
    return files + [line for line in ps if "doctor" in line.split()]


DOCKER = (
    "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && "
    "ip link set docker0 up"
)


@pytest.fixture
def docker0(lab: Lab) -> Iterator[str]:
    """Give both hosts an interface that is not connected; return how host 1's name leads to it."""
    for host in range(2):
        assert lab.run(host, ["sh", "-c", DOCKER], timeout=30).returncode == 0
    yield "172.17.0.1"
    for host in range(2):
        lab.run(host, ["ip", "link", "del", "docker0"], timeout=30)


def test_interface_that_is_not_connected_is_named(lab: Lab, docker0: str) -> None:
    (found,) = others(examined(lab, "torch_impl")[1])
    assert "docker0 has the address 172.17.0.1 on host0, host1" in found
    assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in found
    wrong = doctor(lab, "torch_impl", GLOO_SOCKET_IFNAME="docker0")
    assert wrong.returncode == 1
    assert re.search(
        r"ERROR: rank 0 on host0 \(e0 10\.77\.0\.1, docker0 172\.17\.0\.1\) cannot connect to rank "
        r"1 on host1 at 172\.17\.0\.1:\d+ \(docker0\): .*; host0 has the address "
        r"172\.17\.0\.1, too: set GLOO_SOCKET_IFNAME=e0 and NCCL_SOCKET_IFNAME=e0",
        wrong.stdout,
    ), wrong.stdout + wrong.stderr
    missing = doctor(lab, "torch_impl", "export GLOO_SOCKET_IFNAME=ib7")
    assert missing.returncode == 1
    assert re.search(
        r"ERROR: GLOO_SOCKET_IFNAME: expected an interface of host1 \(.*\), got 'ib7'",
        missing.stdout,
    ), missing.stdout + missing.stderr


def test_name_that_leads_to_the_loopback_is_named(lab: Lab) -> None:
    change = (
        "cp /etc/hosts /tmp/before && umount /etc/hosts && sed 's/10.77.0.2 /127.0.1.1 /' "
        "/tmp/before > /tmp/hosts && mount --bind /tmp/hosts /etc/hosts"
    )
    with planted(lab, change, "umount /etc/hosts; mount --bind /tmp/before /etc/hosts"):
        done = doctor(lab, "torch_impl")
    assert done.returncode == 1
    assert re.search(
        r"rank 0 on host0 .* cannot connect to rank 1 on host1 at 127\.0\.1\.1:\d+ \(lo\): .*; the "
        r"name host1 leads to the loopback there, see its /etc/hosts: set GLOO_SOCKET_IFNAME=e0",
        done.stdout,
    ), done.stdout + done.stderr


def test_rank_that_does_not_come_is_named(lab: Lab) -> None:
    done = doctor(lab, "torch_impl", "exec true", LVXATTN_TIMEOUT="4")
    assert done.returncode == 1
    assert re.search(
        r"lvxattn: error: rank 0 on host0 \(e0 10\.77\.0\.1\) has not met the others at "
        r"host0:20000 \(MASTER_ADDR, MASTER_PORT\) within 4 s: .*\. Was each",
        done.stderr,
    ), done.stderr
    assert "Traceback" not in done.stderr

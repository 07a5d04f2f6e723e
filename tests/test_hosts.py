"""Launchers across two hosts of a lab, by SSH: the lines of docs/clusters.md, and lost hosts."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.netlab.lab import MPICH_OVER_TCP, Lab, LabError, find_mpiexec, why_not
from benchmarks.netlab.ssh import SSH, why_no_ssh
from lvxattn.plan import messages, planned
from tests.launch import ROOT, THREADS, environment, until

pytestmark = [pytest.mark.mpi, pytest.mark.slow]
HOSTS = 2
TIME_LIMIT = 6
# Seconds to start, and to end, on a busy machine; how soon after the time limit is not tested.
START, END = 150.0, 90.0
OPEN_MPI = "mpirun.openmpi"  # Debian's name beside another MPI's mpirun
RUN = "-m lvxattn.mpi_impl run"
RANKS = "python -m mpi4py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder that all hosts see."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def lab(folder: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    if reason := why_no_ssh() or why_not():
        pytest.skip(reason)
    # What an installed environment, and a profile that loads Open MPI, would have.
    login = {"PYTHONPATH": environment()["PYTHONPATH"], "OMP_NUM_THREADS": THREADS}
    libraries = sorted(Path("/usr/lib").glob("*/libmpi.so.40"))
    if "open mpi" in request.node.name.replace("_", " ") and libraries:
        login["MPI4PY_LIBMPI"] = str(libraries[0])
    with Lab(HOSTS, "1gbit", shared=[folder]) as lab, SSH(lab, login):
        yield lab


@pytest.fixture
def open_mpi(folder: Path) -> dict[str, str]:
    """Return the variables by which `mpirun` is Open MPI's, and mpi4py takes its library."""
    launcher = shutil.which(OPEN_MPI)
    libraries = sorted(Path("/usr/lib").glob("*/libmpi.so.40"))
    if not launcher or not libraries:
        pytest.skip(f"{OPEN_MPI}: not installed; benchmarks/netlab/install.sh installs it")
    (folder / "mpirun").unlink(missing_ok=True)
    (folder / "mpirun").symlink_to(launcher)
    return {
        "PATH": f"{folder}:{path()}",
        "MPI4PY_LIBMPI": str(libraries[0]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def path() -> str:
    """Return a PATH on which MPICH's mpiexec and Python's commands come first."""
    beside = [str(Path(find_mpiexec()[0]).parent), str(Path(sys.executable).parent)]
    return os.pathsep.join([*beside, os.environ["PATH"]])


def variables(lab: Lab) -> dict[str, str]:
    """Return the environment of a launcher."""
    seen = lab.run(0, ["ls", "/sys/class/net"]).stdout.split()
    # Where /sys cannot be that of the host, UCX does not find its interface.
    network = {} if "e0" in seen else MPICH_OVER_TCP
    return environment({"PATH": path(), "OMP_NUM_THREADS": THREADS, **network})


def documented(launcher: str) -> list[str]:
    """Return the blocks of the section "Launching" that begin with, or contain, a launcher."""
    text = (ROOT / "docs/clusters.md").read_text()
    section = text[text.index("## Launching") : text.index("## Slurm")]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
    return [block for block in blocks if re.search(rf"^{launcher} ", block, re.M)]


def run_script(lab: Lab, folder: Path, script: str, **env: str) -> str:
    """Run a script on host 0, in the shared folder; it must end well."""
    command = ["sh", "-e", "-c", f"cd {folder}\n{script}"]
    done = lab.run(0, command, timeout=300, env={**variables(lab), **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(out: str) -> None:
    """Check the output of a doctor and of a run on two hosts of two ranks."""
    assert "4 on 2 hosts" in out
    assert "no problems found" in out
    check_run(out)


def check_run(out: str) -> None:
    assert re.findall(r"^ +\d  (host\d)", out, re.M) == ["host0", "host0", "host1", "host1"]
    assert "all checks passed" in out


def test_documented_lines_of_mpich(lab: Lab, folder: Path) -> None:
    (script,) = (block for block in documented("mpiexec") if "-hosts" in block)
    check(run_script(lab, folder, script))


def test_documented_lines_of_open_mpi(lab: Lab, folder: Path, open_mpi: dict[str, str]) -> None:
    (script,) = documented("mpirun")
    check(run_script(lab, folder, script, **open_mpi))


def test_documented_lines_of_torchrun(lab: Lab, folder: Path) -> None:
    pytest.importorskip("torch")
    (script,) = documented("torchrun")
    export, static, c10d = re.split(r"(?=^torchrun )", script, flags=re.M)
    for line in static, c10d:
        before = lab.bytes_sent()
        other = line.replace("--node-rank 0", "--node-rank 1")
        both = export + line, export + other
        ended = [
            lab.start(
                host,
                ["sh", "-e", "-c", f"cd {folder}\n{text}"],
                env=variables(lab),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for host, text in enumerate(both)
        ]
        outputs = [process.communicate(timeout=START + END) for process in ended]
        assert [process.returncode for process in ended] == [0, 0], outputs
        check_run(outputs[0][0] + outputs[1][0])
        ratios = np.subtract(lab.bytes_sent(), before) / crossing([0, 0, 1, 1])
        # The check and torchrun send something, too.
        assert ratios.min() >= 1, ratios
        assert ratios.max() < 2, ratios


@pytest.mark.parametrize("placement", ["block", "cyclic"])
def test_bytes_between_hosts_are_those_of_the_plan(lab: Lab, folder: Path, placement: str) -> None:
    hosts = [0, 0, 1, 1] if placement == "block" else [0, 1, 0, 1]
    side_by_side = 2 if placement == "block" else 1
    before = lab.bytes_sent()
    report = folder / "report.json"
    run_script(
        lab,
        folder,
        f"mpiexec -n 4 -ppn {side_by_side} -hosts host0,host1 {RANKS} {RUN} --quiet --backward "
        f"--repeat 2 --json {report}",
    )
    sent = np.subtract(lab.bytes_sent(), before)
    assert [f"host{host}" for host in hosts] == [
        rank["host"] for rank in json.loads(report.read_text())["ranks"]
    ]
    # Three times with the warm-up.
    assert sent == pytest.approx(3 * crossing(hosts), rel=0.05)


def crossing(hosts: list[int]) -> np.ndarray:
    """Return the bytes that each host's ranks send to the other host, forward and backward."""
    order = tuple(sorted(range(4), key=hosts.__getitem__))
    layout = planned((1, 8, 1024, 64), (1, 8, 16384, 64), 4, dtype="float32")
    sent = np.zeros(HOSTS)
    for rank in range(4):
        mine = replace(layout, rank=rank, order=order)
        for backward in (False, True):
            for message in messages(mine, rank, backward=backward):
                if hosts[message.dest] != hosts[rank]:
                    sent[hosts[rank]] += message.nbytes
    return sent


def endless(launcher: str) -> tuple[str, ...]:
    """Return the lines that start ranks which compute until they are ended, by host."""
    # Small, so that all ranks of a host begin to wait at nearly the same time.
    run = "run --repeat 1000000 --text-tokens 64 --visual-tokens 256"
    torch = f"-m lvxattn.torch_impl {run}"
    return {
        "mpich": (f"mpiexec -n 4 -ppn 2 -hosts host0,host1 {RANKS} -m lvxattn.mpi_impl {run}",),
        "open mpi": (
            "mpirun -np 4 --host host0:2,host1:2 --map-by ppr:2:node --bind-to none -x PATH "
            f"-x LVXATTN_TIMEOUT {RANKS} -m lvxattn.mpi_impl {run}",
        ),
        "torchrun": tuple(
            f"torchrun --nnodes 2 --node-rank {i} --nproc-per-node 2 --master-addr host0 "
            f"--master-port 29500 {torch}"
            for i in range(HOSTS)
        ),
    }[launcher]


def processes(lab: Lab, host: int, besides: str | None = None) -> list[str]:
    """Return the commands of a host's processes besides the lab's own."""
    lines = lab.run(host, ["ps", "-wweo", "args="]).stdout.splitlines()
    ours = ["holder.py", "sshd", "ps -wweo", *filter(None, [besides])]
    return [line for line in lines if not any(own in line for own in ours)]


def ranks_on(lab: Lab, host: int) -> list[str]:
    """Return the commands of the ranks on a host."""
    is_rank = re.compile(r"\S*python\S* (-u )?-m (mpi4py|lvxattn)")
    return [line for line in processes(lab, host) if is_rank.match(line)]


@pytest.mark.parametrize("how", ["cut", "freeze"])
@pytest.mark.parametrize("launcher", ["mpich", "open mpi", "torchrun"])
def test_lost_host_ends_all_others_and_is_named(
    lab: Lab, folder: Path, launcher: str, how: str, request: pytest.FixtureRequest
) -> None:
    env = {**variables(lab), "LVXATTN_TIMEOUT": str(TIME_LIMIT), "GLOO_SOCKET_IFNAME": "e0"}
    if launcher == "open mpi":
        env |= request.getfixturevalue("open_mpi")
    if launcher == "torchrun":
        pytest.importorskip("torch")
        # Until all have begun, one that imports torch slowly is not to be taken for lost.
        env["LVXATTN_TIMEOUT"] = str(5 * TIME_LIMIT)
    said = folder / "said"
    with ExitStack() as ends, said.open("w") as output:
        for host, line in enumerate(endless(launcher)):
            command = ["sh", "-c", f"cd {folder}\n{line}\nexit $?"]
            started = lab.start(host, command, env=env, stdout=output, stderr=output)
            ends.callback(started.wait)
        ends.callback(lab.close)
        lose_host_1(lab, launcher, how, said)


def lose_host_1(lab: Lab, launcher: str, how: str, said: Path) -> None:
    """Wait until all ranks compute; lose a host; check what is left on the other, and is said."""
    # Printed when all ranks have read their share.
    begun = "  memory  "
    assert until(lambda: begun in said.read_text(errors="replace") or not processes(lab, 0), START)
    assert begun in said.read_text(errors="replace"), said.read_text(errors="replace")
    (lab.cut if how == "cut" else lab.freeze)(1)
    assert until(lambda: not ranks_on(lab, 0), END), said.read_text(errors="replace")
    # Once it is to end all ranks, Open MPI's mpirun waits for those of the lost host.
    own = "mpirun" if launcher == "open mpi" else None
    assert until(lambda: not processes(lab, 0, own), END), processes(lab, 0, own)
    # Not before: a launcher passes on what ranks have said when they are gone, too.
    text = said.read_text(errors="replace")
    waits = "failed while waiting for" if launcher == "torchrun" else "has waited .* s for"
    assert re.search(rf"rank [01] of 4 {waits} .*on host1\)", text), text
    assert not re.search(r"no answer from [^:\n]*rank [01] on", text), text
    if launcher == "mpich":  # Open MPI's mpirun may be faster
        silent = r"no answer from rank 2 on host1, rank 3 on host1($|\n|: lost, busy, or )"
        assert re.search(silent, text), text
    # Open MPI's daemon may still remove its own.
    assert until(lambda: not lab.run(0, ["ls", "/dev/shm"]).stdout), lab.run(0, ["ls", "/dev/shm"])


@pytest.mark.parametrize("implementation", ["mpi", "torch"])
def test_file_that_one_host_sees_is_refused_by_all(
    lab: Lab, folder: Path, implementation: str
) -> None:
    small = "--quiet --text-tokens 64 --visual-tokens 128"
    mine, shared = "/tmp/mine.safetensors", folder / "shared.safetensors"
    make = (
        "import numpy as np\nfrom safetensors.numpy import save_file\n"
        "x = np.ones((1, 2, 64, 16), np.float32)\n"
        f"for name in '{mine}', '{shared}': save_file(dict(q=x, k=x, v=x), name)\n"
    )
    run_script(lab, folder, f"{sys.executable} -c {shlex.quote(make)}")
    other = f"head -c 9000 {shared} > {mine}"
    cases = [
        (f"--input {mine}", "host1 does not see what host0 sees"),
        (f"{small} --output {mine}", "host1 does not see what host0 sees"),
        (f"--input {mine}", r"24,\d\d\d bytes on host0, 9,000 bytes on host1"),
    ]
    for arguments, said in cases if implementation == "mpi" else cases[:1]:
        status, err = run_refused(lab, folder, implementation, arguments)
        lines = [line for line in err.splitlines() if "lvxattn run: error" in line]
        assert len(lines) == 1, err
        assert re.search(rf"--(in|out)put: {mine}: expected one file .*{said}", lines[0]), err
        assert "(on all ranks)" in lines[0]
        assert status == (2 if implementation == "mpi" else 1)
        if "output" in arguments:  # what was there is kept, and nothing is beside it
            names = lab.run(0, ["ls", "/tmp"]).stdout.split()
            assert [name for name in names if "mine" in name] == ["mine.safetensors"]
            lab.run(1, ["sh", "-c", other])


def run_refused(lab: Lab, folder: Path, implementation: str, arguments: str) -> tuple[int, str]:
    """Run on all ranks what is refused; return the status, and what all have printed on stderr."""
    if implementation == "mpi":
        lines = [f"mpiexec -n 4 -ppn 2 -hosts host0,host1 {RANKS} -m lvxattn.mpi_impl"]
    else:
        pytest.importorskip("torch")
        lines = [
            f"torchrun --nnodes 2 --node-rank {i} --nproc-per-node 1 --master-addr host0 "
            "--master-port 29500 -m lvxattn.torch_impl"
            for i in range(HOSTS)
        ]
    started = [
        lab.start(
            host,
            ["sh", "-c", f"cd {folder}; exec {line} run {arguments}"],
            env=variables(lab),
            stderr=subprocess.PIPE,
        )
        for host, line in enumerate(lines)
    ]
    errors = [process.communicate(timeout=START + END)[1] for process in started]
    return started[0].returncode, "".join(errors)


def test_ssh_needs_no_password_and_no_options(lab: Lab) -> None:
    for host, name in (0, "host1"), (1, "host0"), (1, "10.77.0.1"), (0, "host0"):
        done = lab.run(host, ["ssh", name, "hostname"], timeout=60)
        expected = name if name.startswith("host") else "host0"
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")


def test_missing_ssh_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.netlab.ssh.PATH", "")
    with pytest.raises(LabError, match=r"sshd, .*not installed.*install\.sh"), SSH(Lab(1, "1gbit")):
        pass

r"""A cluster on one machine: hosts with links of a chosen rate, and MPI ranks on them.

A host has a network, a host name, processes, /tmp and /dev/shm of its own (namespaces: net, uts,
pid, mount); the rest of the file system is shared, as on a cluster.  Its link leads to a switch in
one more network, and what it sends is held to the rate by a token bucket:

    host0 --| rate |--+            +--| rate |-- host2        | rate |  e0, 10.77.0.(i + 1)
                      +-- switch --+
    host1 --| rate |--+            +--| rate |-- host3

Links carry frames of 9,000 bytes.  The bucket holds 1 ms of the rate, at least 16 kB: messages well
above that are held to the rate, smaller ones pass on credit.  Latency is not shaped.

Nothing has a name outside the lab: its namespaces live in processes that read from a pipe and end
with it, and the hosts' PID namespaces lie in the switch's.  When the lab is closed, or the process
that made it ends, by SIGKILL too, the kernel removes all of it; any number of labs can be open at
once.

It needs Linux with `ip`, `tc`, `unshare` and `nsenter`, MPICH's mpiexec, and root or unprivileged
user namespaces.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

AGENT = Path(__file__).with_name("agent.sh")
HOLDER = Path(__file__).with_name("holder.py")
ROOT = Path(__file__).parents[2]
# MPICH's default, UCX, was seen not to connect the hosts: "Endpoint timeout".
MPICH_OVER_TCP = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "e0"}
# Those of the switch; a host has a mount namespace, too.
NAMESPACES = "--net", "--uts", "--pid", "--fork"
# Entering a mount namespace leaves the folder.
IN_FOLDER = "sh", "-c", 'cd "$0" && exec "$@"'
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}


class LabError(RuntimeError):
    """A requirement of a lab is missing; the message names it."""


class Lab:
    """A cluster that exists inside a ``with`` block.

    Parameters
    ----------
    hosts : int
    rate : str
        Rate of each host's link in tc's units: ``"50mbit"``, ``"1gbit"``.
    ranks_per_host : int
    placement : str
        ``"block"``: ranks 0 1 on host 0, 2 3 on host 1.  ``"cyclic"``: 0 2 and 1 3.
    shared : sequence of path
        Folders below /tmp or /dev/shm that all hosts share with this machine, besides the current
        folder, this checkout, and those of this Python.

    Raises
    ------
    LabError
        On entry: a tool, privileges or MPICH's mpiexec are missing.
    """

    def __init__(
        self,
        hosts: int,
        rate: str,
        ranks_per_host: int = 1,
        placement: str = "block",
        shared: Sequence[str | Path] = (),
    ) -> None:
        if placement not in ("block", "cyclic"):
            raise ValueError(f"placement: expected 'block' or 'cyclic', got {placement!r}")
        if not 1 <= hosts <= 250 or ranks_per_host < 1:
            raise ValueError(
                "hosts, ranks_per_host: expected 1 to 250 and at least 1, got "
                f"{hosts} and {ranks_per_host}"
            )
        self.hosts, self.rate, self.ranks_per_host = hosts, rate, ranks_per_host
        self.placement, self.bits_per_second = placement, bits_per_second(rate)
        self.shared = shared
        #: Processes that hold the namespaces: the switch's, then every host's.
        self.pids: list[int] = []
        self._started: list[subprocess.Popen[str]] = []
        self._lifeline: int | None = None
        # Options of nsenter besides the process whose namespaces it enters.
        self._user: list[str] = []

    def __enter__(self) -> "Lab":
        """Build it."""
        for tool, package in PACKAGES.items():
            if not shutil.which(tool):
                raise LabError(f"{tool} is not on PATH; it comes with {package}")
        self._mpiexec = find_mpiexec()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End all processes of the lab, and with them the lab.  May be called twice."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        for process in self._started:
            process.wait()
        self._started, self.pids = [], []

    def start(
        self, host: int, command: Sequence[str | Path], **options: Any
    ) -> "subprocess.Popen[str]":
        """Start a command on a host, in the current folder; the options are those of Popen.

        The process returned waits for the command and has its exit status.  A signal sent to it
        does not reach the command, which ends with the lab at the latest.
        """
        return subprocess.Popen(
            [*self._enter(host), "--", *IN_FOLDER, os.getcwd(), *map(str, command)],
            **{"stdin": subprocess.DEVNULL, "text": True, **options},
        )

    def run(
        self,
        host: int,
        command: Sequence[str | Path],
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host, and return its output; parameters as of `mpiexec`."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return self._finish(
            self.start(host, command, env={**os.environ, **(env or {})}, **pipes), timeout
        )

    def mpiexec(
        self,
        command: Sequence[str | Path],
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        capture: bool = True,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on every rank, and wait for it.

        Parameters
        ----------
        command : sequence
            ``[sys.executable, "-m", "mpi4py", FILE, ...]``
        timeout : float, optional
            Seconds; a run that takes longer ends the lab.
        env : mapping, optional
            Added to the environment.
        capture : bool
            Return the output, instead of printing it.

        Returns
        -------
        subprocess.CompletedProcess

        Raises
        ------
        subprocess.TimeoutExpired
            The time was up; the lab is closed.
        """
        addresses = [address(i) for i in range(self.hosts)]
        side_by_side = self.ranks_per_host if self.placement == "block" else 1
        process = subprocess.Popen(
            [
                *self._enter_user(self.pids[1]),
                *("--net", "--uts"),
                # The processes of all hosts are below the switch's.
                *(f"--pid=/proc/{self.pids[0]}/ns/pid", "--"),
                *self._mpiexec,
                *("-launcher", "ssh", "-launcher-exec", str(AGENT), "-iface", "e0"),
                *("-hosts", ",".join(addresses), "-ppn", str(side_by_side)),
                *("-n", str(self.hosts * self.ranks_per_host)),
                *map(str, command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.PIPE if capture else None,
            text=True,
            env={
                **os.environ,
                **MPICH_OVER_TCP,
                **(env or {}),
                "HYDRA_LAUNCHER_AUTOFORK": "0",  # the first host, too, is entered by the agent
                "NETLAB_HOSTS": " ".join(
                    f"{a}={pid}" for a, pid in zip(addresses, self.pids[1:], strict=True)
                ),
            },
        )
        return self._finish(process, timeout)

    def _finish(
        self, process: "subprocess.Popen[str]", timeout: float | None
    ) -> "subprocess.CompletedProcess[str]":
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            self.close()  # ends the processes on the hosts, which a signal might not reach
            process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def bytes_sent(self) -> list[int]:
        """Return the number of bytes each host has sent over its link since the lab was built."""
        return [sent_by(pid) for pid in self.pids[1:]]

    def _build(self) -> None:
        ends, self._lifeline = os.pipe()
        try:
            switch = self._hold_switch(ends)
            in_lab = [*self._enter_user(switch), "--pid", "--", "unshare", *NAMESPACES, "--mount"]
            names = "".join(f"{address(i)} host{i}\n" for i in range(self.hosts))
            for i in range(self.hosts):
                machine = f"host{i}", f"127.0.0.1 localhost\n{names}", *self._folders()
                self._hold(ends, in_lab, *machine)
        finally:
            os.close(ends)
        self._inside(switch, "ip link add br0 mtu 9000 type bridge", "ip link set br0 up")
        burst = max(16000, self.bits_per_second // 8000)
        for i, pid in enumerate(self.pids[1:]):
            self._inside(
                pid,
                f"ip link add e0 mtu 9000 type veth peer name p{i} mtu 9000 netns {switch}",
                "ip link set e0 addrgenmode none",  # no neighbour discovery of IPv6 in the counters
                f"ip addr add {address(i)}/24 dev e0",
                f"tc qdisc add dev e0 root tbf rate {self.rate} burst {burst} latency 50ms",
                "ip link set lo up",
                "ip link set e0 up",
            )
            self._inside(switch, f"ip link set p{i} master br0 up")

    def _hold_switch(self, ends: int) -> int:
        """Make the switch's namespaces as root or, if refused, as root of a user namespace."""
        try:
            self._hold(ends, ["unshare", *NAMESPACES], "switch")
        except LabError as as_root:
            self._user = ["--user", "--preserve-credentials"]
            try:
                as_root_of = "--user", "--map-root-user"
                self._hold(ends, ["unshare", *as_root_of, *NAMESPACES], "switch")
            except LabError as as_user:
                raise LabError(
                    "network namespaces need root or unprivileged user namespaces, and both were "
                    f"refused ({as_root}; {as_user})"
                ) from None
        return self.pids[0]

    def _hold(self, ends: int, command: Sequence[str], *machine: str) -> None:
        holder = subprocess.Popen(
            [*command, sys.executable, "-I", "-S", str(HOLDER), *machine],
            stdin=ends,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that the terminal's Ctrl-C does not reach it
        )
        assert holder.stdout is not None
        assert holder.stderr is not None
        with holder.stdout, holder.stderr:
            if pid := holder.stdout.readline():
                self.pids.append(int(pid))
                self._started.append(holder)
                return
            reason = holder.stderr.read().strip()
        holder.wait()
        raise LabError(reason.splitlines()[-1] if reason else f"{command[0]} failed")

    def _inside(self, pid: int, *commands: str) -> None:
        """Run commands in the network namespace of a holder."""
        done = subprocess.run(
            [*self._enter_user(pid), "--net", "--", "sh", "-e", "-c", "\n".join(commands)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"{commands[0]} ...: {done.stderr.strip()}")

    def _enter(self, host: int) -> list[str]:
        return [*self._enter_user(self.pids[1 + host]), "--mount", "--net", "--uts", "--pid"]

    def _folders(self) -> list[str]:
        """Return the folders that hosts share with this machine if they lie below /tmp."""
        python = [sys.prefix, sys.base_prefix, *filter(os.path.isdir, sys.path)]
        folders = {os.path.realpath(folder) for folder in (".", ROOT, *python, *self.shared)}
        return sorted(folders)

    def _enter_user(self, pid: int) -> list[str]:
        return ["nsenter", "--target", str(pid), *self._user]


def why_not() -> str | None:
    """Return why no lab can be built here, or None."""
    try:
        with Lab(hosts=1, rate="1gbit"):
            return None
    except LabError as reason:
        return str(reason)


def address(host: int) -> str:
    """Return a host's address, the same in every lab: labs do not see one another."""
    return f"10.77.0.{host + 1}"


def bits_per_second(rate: str) -> int:
    """Return the bits per second of a rate such as ``"50mbit"``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate)
    if not match:
        raise ValueError(f"rate: expected a number and kbit, mbit or gbit, got {rate!r}")
    return round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]])


def sent_by(pid: int | str) -> int:
    """Return the number of bytes that left over the link of a process's host."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "e0":
            return int(counters.split()[8])
    raise LookupError(f"process {pid} is not on a host of a lab")


def find_mpiexec() -> list[str]:
    """Return MPICH's launcher: ``LVXATTN_MPIEXEC``, the one beside Python, or PATH's.

    Raises
    ------
    LabError
        There is none, or it belongs to another MPI.
    """
    beside = Path(sys.executable).with_name("mpiexec")
    command = shlex.split(os.environ.get("LVXATTN_MPIEXEC", ""))
    command = command or [str(beside) if beside.exists() else "mpiexec"]
    if not shutil.which(command[0]):
        raise LabError(f"{command[0]} is not installed; pip install mpich installs it")
    version: Any = subprocess.run([*command, "--version"], capture_output=True, text=True)
    if "HYDRA" not in version.stdout:
        raise LabError(f"{command[0]} is not MPICH's: its version does not name HYDRA")
    return command

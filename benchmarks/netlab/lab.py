r"""A cluster on one machine: hosts with links of a chosen rate, and MPI ranks on them.

A host is a network namespace with a name of its own (a UTS namespace).  Its link leads to a switch
in one more namespace, and what it sends is held to the rate by a token bucket:

    host0 --| rate |--+            +--| rate |-- host2        | rate |  e0, 10.77.0.(i + 1)
                      +-- switch --+
    host1 --| rate |--+            +--| rate |-- host3

Links carry frames of 9,000 bytes.  The bucket holds 1 ms of the rate, at least 16 kB: messages well
above that are held to the rate, smaller ones pass on credit.  Latency is not shaped.

Nothing has a name outside the lab: its namespaces live in processes that read from a pipe and end
with it, and the programs that run on the hosts live in a PID namespace that ends with the switch.
When the lab is closed, or the process that made it ends, by SIGKILL too, the kernel removes all of
it; any number of labs can be open at once.

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
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}

# Names a host in namespaces of its own, reports that, and keeps them until its input ends.
HOLDER = """
import socket, sys
socket.sethostname(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


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

    Raises
    ------
    LabError
        On entry: a tool, privileges or MPICH's mpiexec are missing.
    """

    def __init__(
        self, hosts: int, rate: str, ranks_per_host: int = 1, placement: str = "block"
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
        #: Processes that hold the namespaces: the switch's, then every host's.
        self.holders: list[subprocess.Popen[str]] = []
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
        for holder in self.holders:
            holder.wait()
        self.holders = []

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
        pids = [holder.pid for holder in self.holders[1:]]
        side_by_side = self.ranks_per_host if self.placement == "block" else 1
        process = subprocess.Popen(
            [
                *self._enter(0),
                f"--pid=/proc/{self.holders[0].pid}/ns/pid_for_children",
                "--",
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
                "MPIR_CVAR_CH4_NETMOD": "ofi",
                "FI_PROVIDER": "tcp",
                "FI_TCP_IFACE": "e0",
                **(env or {}),
                "NETLAB_HOSTS": " ".join(
                    f"{a}={pid}" for a, pid in zip(addresses, pids, strict=True)
                ),
            },
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            self.close()  # ends the ranks, which a signal to the launcher might not
            process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def bytes_sent(self) -> list[int]:
        """Return the number of bytes each host has sent over its link since the lab was built."""
        return [sent_by(holder.pid) for holder in self.holders[1:]]

    def _build(self) -> None:
        ends, self._lifeline = os.pipe()
        try:
            switch = self._hold_switch(ends)
            in_lab = [*self._enter_user(switch), "unshare"] if self._user else ["unshare"]
            for i in range(self.hosts):
                self._hold(ends, f"host{i}", *in_lab, "--net", "--uts")
        finally:
            os.close(ends)
        self._inside(switch, "ip link add br0 mtu 9000 type bridge", "ip link set br0 up")
        burst = max(16000, self.bits_per_second // 8000)
        for i, holder in enumerate(self.holders[1:]):
            self._inside(
                holder.pid,
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
        namespaces = "--net", "--uts", "--pid", "--fork"
        try:
            self._hold(ends, "switch", "unshare", *namespaces)
        except LabError as as_root:
            self._user = ["--user", "--preserve-credentials"]
            try:
                self._hold(ends, "switch", "unshare", "--user", "--map-root-user", *namespaces)
            except LabError as as_user:
                raise LabError(
                    "network namespaces need root or unprivileged user namespaces, and both were "
                    f"refused ({as_root}; {as_user})"
                ) from None
        return self.holders[0].pid

    def _hold(self, ends: int, name: str, *command: str) -> None:
        holder = subprocess.Popen(
            [*command, sys.executable, "-I", "-S", "-c", HOLDER, name],
            stdin=ends,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that the terminal's Ctrl-C does not reach it
        )
        assert holder.stdout is not None
        assert holder.stderr is not None
        with holder.stdout, holder.stderr:
            if holder.stdout.readline() == "ready\n":
                self.holders.append(holder)
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
        return [*self._enter_user(self.holders[1 + host].pid), "--net", "--uts"]

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

"""How the hosts of a lab are built: namespaces, held by processes, and the links between them.

The holders read from a pipe and end with it; the hosts' PID namespaces lie in the switch's.  So the
kernel removes everything when the pipe's other end is closed, or its process ends.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOLDER = Path(__file__).with_name("holder.py")
# Those of the switch; a host has a mount namespace, too.
KINDS = "--net", "--uts", "--ipc", "--pid", "--fork"
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}


class LabError(RuntimeError):
    """A requirement of a lab is missing; the message names it."""


class Namespaces:
    """A switch, and hosts with links to it.

    Parameters
    ----------
    rates : sequence of str
        By host, what its link may send a second.
    folders : sequence of str
        Below /tmp or /dev/shm, and shared by all hosts and this machine.

    Attributes
    ----------
    pids : list of int
        Processes that hold the namespaces: the switch's, then every host's.

    Raises
    ------
    LabError
        Privileges are missing.
    """

    def __init__(self, rates: Sequence[str], folders: Sequence[str]) -> None:
        self.pids: list[int] = []
        self._holders: list[subprocess.Popen[str]] = []
        # Options of nsenter besides the process whose namespaces it enters.
        self._user: list[str] = []
        ends, self._lifeline = os.pipe()
        try:
            self._build(ends, rates, folders)
        except BaseException:
            os.close(ends)
            self.close()
            raise
        os.close(ends)

    def close(self) -> None:
        """End all processes in the namespaces, and with them the namespaces.  To be called once."""
        os.close(self._lifeline)
        for holder in self._holders:
            holder.wait()
        self.pids = []

    def enter(self, host: int) -> list[str]:
        """Return the beginning of a command line that runs the rest of it on a host."""
        namespaces = "--mount", "--net", "--uts", "--ipc", "--pid"
        return [*self._enter_user(self.pids[1 + host]), *namespaces, "--"]

    def enter_launcher(self) -> list[str]:
        """Return the same for a launcher beside the hosts, in host 0's network.

        The processes of all hosts are below the switch's.
        """
        processes = f"--pid=/proc/{self.pids[0]}/ns/pid"
        return [*self._enter_user(self.pids[1]), "--net", "--uts", processes, "--"]

    def in_network(self, pid: int, *commands: str) -> None:
        """Run commands in the network namespace of a holder."""
        done = subprocess.run(
            [*self._enter_user(pid), "--net", "--", "sh", "-e", "-c", "\n".join(commands)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"{commands[0]} ...: {done.stderr.strip()}")

    def _build(self, ends: int, rates: Sequence[str], folders: Sequence[str]) -> None:
        switch = self._hold_switch(ends)
        in_lab = [*self._enter_user(switch), "--pid", "--", "unshare", *KINDS, "--mount"]
        names = "".join(f"{address(i)} host{i}\n" for i in range(len(rates)))
        for i in range(len(rates)):
            self._hold(ends, in_lab, f"host{i}", f"127.0.0.1 localhost\n{names}", *folders)
        self.in_network(switch, "ip link add br0 mtu 9000 type bridge", "ip link set br0 up")
        for i, (pid, rate) in enumerate(zip(self.pids[1:], rates, strict=True)):
            burst = max(16000, bits_per_second(rate) // 8000)
            # What exceeds the latency is dropped, and TCP sends it again after 0.2 s or more: on a
            # slow link of 50 ms several messages at once took up to four times as long.
            self.in_network(
                pid,
                f"ip link add e0 mtu 9000 type veth peer name p{i} mtu 9000 netns {switch}",
                "ip link set e0 addrgenmode none",  # no neighbour discovery of IPv6 in the counters
                f"ip addr add {address(i)}/24 dev e0",
                f"tc qdisc add dev e0 root tbf rate {rate} burst {burst} latency 1s",
                "ip link set lo up",
                "ip link set e0 up",
            )
            self.in_network(switch, f"ip link set p{i} master br0 up")

    def _hold_switch(self, ends: int) -> int:
        """Make the switch's namespaces as root or, if refused, as root of a user namespace."""
        try:
            self._hold(ends, ["unshare", *KINDS], "switch")
        except LabError as as_root:
            self._user = ["--user", "--preserve-credentials"]
            try:
                self._hold(ends, ["unshare", "--user", "--map-root-user", *KINDS], "switch")
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
                self._holders.append(holder)
                return
            reason = holder.stderr.read().strip()
        holder.wait()
        raise LabError(reason.splitlines()[-1] if reason else f"{command[0]} failed")

    def _enter_user(self, pid: int) -> list[str]:
        return ["nsenter", "--target", str(pid), *self._user]


def check_tools() -> None:
    """Raise a LabError if a tool is missing."""
    for tool, package in PACKAGES.items():
        if not shutil.which(tool):
            raise LabError(f"{tool} is not on PATH; it comes with {package}")


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

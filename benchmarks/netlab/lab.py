r"""A cluster on one machine: hosts with links of a chosen rate, and MPI ranks on them.

A host has a network, a host name, processes, /tmp and /dev/shm of its own (namespaces: net, uts,
ipc, pid, mount); the rest of the file system is shared, as on a cluster.  Its link leads to a
switch in one more network, and what it sends is held to the rate by a token bucket:

    host0 --| rate |--+            +--| rate |-- host2        | rate |  e0, 10.77.0.(i + 1)
                      +-- switch --+
    host1 --| rate |--+            +--| rate |-- host3

Links carry frames of 9,000 bytes.  The bucket holds 1 ms of the rate, at least 16 kB: messages well
above that are held to the rate, smaller ones pass on credit.  Latency is not shaped.

Nothing has a name outside the lab.  When it is closed, or the process that made it ends, by SIGKILL
too, the kernel removes all of it; any number of labs can be open at once.

It needs Linux with `ip`, `tc`, `unshare` and `nsenter`, MPICH's mpiexec, and root or unprivileged
user namespaces.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .namespaces import LabError, Namespaces, address, bits_per_second, check_tools, sent_by

__all__ = ["Lab", "LabError", "address", "bits_per_second", "find_mpiexec", "sent_by", "why_not"]

AGENT = Path(__file__).with_name("agent.sh")
ROOT = Path(__file__).parents[2]
# Recorded results have this.  UCX, MPICH's default, needs the host's own /sys/class/net.
MPICH_OVER_TCP = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "e0"}
# Entering a mount namespace leaves the folder.
IN_FOLDER = "sh", "-c", 'cd "$0" && exec "$@"'


class Lab:
    """A cluster that exists inside a ``with`` block.

    Parameters
    ----------
    hosts : int
    rate : str or sequence of str
        Rate of each host's link in tc's units: ``"50mbit"``, ``"1gbit"``; one for all, or one for
        each host.
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
        rate: str | Sequence[str],
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
        self.rates = [rate] * hosts if isinstance(rate, str) else [*rate]
        if len(self.rates) != hosts:
            raise ValueError(f"rate: expected one, or one for each of {hosts} hosts, got {rate!r}")
        self.hosts, self.ranks_per_host, self.placement = hosts, ranks_per_host, placement
        #: Of the slowest link.
        self.bits_per_second = min(map(bits_per_second, self.rates))
        self.shared = shared
        self._namespaces: Namespaces | None = None

    @property
    def pids(self) -> list[int]:
        """Processes that hold the namespaces: the switch's, then every host's; none if closed."""
        return self._namespaces.pids if self._namespaces else []

    def __enter__(self) -> "Lab":
        """Build it."""
        check_tools()
        self._mpiexec = find_mpiexec()
        self._namespaces = Namespaces(self.rates, self._folders())
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End all processes of the lab, and with them the lab.  May be called twice."""
        if self._namespaces is not None:
            self._namespaces.close()
            self._namespaces = None

    def start(
        self, host: int, command: Sequence[str | Path], **options: Any
    ) -> "subprocess.Popen[str]":
        """Start a command on a host, in the current folder; the options are those of Popen.

        The process returned waits for the command and has its exit status.  A signal sent to it
        does not reach the command, which ends with the lab at the latest.
        """
        return subprocess.Popen(
            [*self._open().enter(host), *IN_FOLDER, os.getcwd(), *map(str, command)],
            **{"stdin": subprocess.DEVNULL, "text": True, **options},
        )

    def run(
        self,
        host: int,
        command: Sequence[str | Path],
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        capture: bool = True,
        **options: Any,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host, and return its output; parameters as of `mpiexec`."""
        if capture:
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        variables = {**os.environ, **(env or {})}
        return self._finish(self.start(host, command, env=variables, **options), timeout)

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
                *self._open().enter_launcher(),
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

    def bytes_sent(self) -> list[int]:
        """Return the number of bytes each host has sent over its link since the lab was built."""
        return [sent_by(pid) for pid in self.pids[1:]]

    def cut(self, host: int) -> None:
        """Take a host's link down: nothing reaches it, nothing leaves it, and nobody is told."""
        self._open().in_network(self.pids[1 + host], "ip link set e0 down")

    def freeze(self, host: int) -> None:
        """Stop (SIGSTOP) the processes of a host, whose kernel goes on answering.

        Those that `start` has started are left, as `nsenter` stops with its child, and would not
        see its end: to be frozen, a program must be the child of a shell.
        """
        begun_there = "ps -eo pid=,ppid= | awk '$2 != 0 {print $1}'"
        for _ in range(2):  # one may just have made another
            self.run(host, ["sh", "-c", f"kill -STOP $({begun_there})"])

    def mend(self, host: int) -> None:
        """Undo `cut` and `freeze`."""
        self._open().in_network(self.pids[1 + host], "ip link set e0 up")
        self.run(host, ["sh", "-c", "kill -CONT -1"])

    def _open(self) -> Namespaces:
        if self._namespaces is None:
            raise LabError("the lab is closed")
        return self._namespaces

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

    def _folders(self) -> list[str]:
        """Return the folders that hosts share with this machine if they lie below /tmp."""
        python = [sys.prefix, sys.base_prefix, *filter(os.path.isdir, sys.path)]
        folders = {os.path.realpath(folder) for folder in (".", ROOT, *python, *self.shared)}
        return sorted(folders)


def why_not() -> str | None:
    """Return why no lab can be built here, or None."""
    try:
        with Lab(hosts=1, rate="1gbit"):
            return None
    except LabError as reason:
        return str(reason)


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

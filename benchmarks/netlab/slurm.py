"""Slurm on the hosts of a lab: a controller on host 0, a node on every host.

    with Lab(hosts=2, rate="1gbit") as lab, Slurm(lab) as slurm:
        print(slurm.run(["srun", "-N", "2", "hostname"]).stdout)

Configuration, key, logs and state are in each host's own /tmp/slurm, and the daemons are processes
of the hosts: all of it ends with the lab, however that ends.  A Slurm of the machine's own is
neither read nor changed.

Nodes have as many cores and GPUs as they are told to have, so that scripts for larger clusters are
scheduled.  Ranks are bound to no core, and no GPU is behind what Slurm gives out as one.  A step
that uses more memory than its job has asked for is ended, within seconds.

It needs root, Slurm and MUNGE: `sh benchmarks/netlab/install.sh` installs them on Debian.
"""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .lab import MPICH_OVER_TCP, Lab, LabError, address

DAEMONS = "munged", "slurmctld", "slurmd"
# Daemons are in folders that are not on every user's PATH.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
NODE = "/tmp/slurm"  # on each host
SOCKET = f"{NODE}/munge/socket"
MUNGE = (
    f"--socket={SOCKET} --key-file={NODE}/munge/key --pid-file={NODE}/munge/pid "
    f"--seed-file={NODE}/munge/seed --log-file={NODE}/munge/log"
)
MEMORY = 8000  # MB that a node has for each core, and a job that asks for no other amount
PATIENCE = 60.0  # seconds for what takes two

CONF = """
ClusterName=lab
SlurmctldHost=host0({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket}
CredType=cred/munge
StateSaveLocation={node}/state
SlurmdSpoolDir={node}/spool
SlurmctldPidFile={node}/slurmctld.pid
SlurmdPidFile={node}/slurmd.pid
SlurmctldLogFile={node}/slurmctld.log
SlurmdLogFile={node}/slurmd-%n.log
PlugStackConfig={node}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory}
SchedulerParameters=sched_interval=1,sched_min_interval=0
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MessageTimeout=10
SlurmdTimeout=20
NodeName={names} NodeAddr={addresses} CPUs={cores} RealMemory={all_memory} Gres=gpu:{gpus}
PartitionName=lab Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """A Slurm that exists inside a ``with`` block, on the hosts of an open lab, which ends with it.

    Parameters
    ----------
    lab : Lab
    cores, gpus : int
        What each node is configured with, at least 1.

    Raises
    ------
    LabError
        On entry: Slurm is missing or does not start; the message says what to do, or ends with
        what the daemon wrote last.
    """

    def __init__(self, lab: Lab, cores: int = 64, gpus: int = 4) -> None:
        if cores < 1 or gpus < 1:
            raise ValueError(f"cores, gpus: expected at least 1, got {cores} and {gpus}")
        self.lab, self.cores, self.gpus = lab, cores, gpus
        #: By host and name.
        self._daemons: dict[tuple[int, str], subprocess.Popen[str]] = {}

    def __enter__(self) -> "Slurm":
        """Start all daemons, and wait until every node is idle."""
        if reason := why_no_slurm():
            raise LabError(reason)
        hosts, key = range(self.lab.hosts), secrets.token_hex(64)
        try:
            for host in hosts:
                self._configure(host, key)
                self._start(host, f"munged --foreground {MUNGE}")
            self._until(self._munge_is_there, "MUNGE has made no socket")
            self._start(0, "slurmctld -D -i")
            for host in hosts:
                self._start(host, f"slurmd -D -N host{host}")
            self._until(lambda: {*self.states()} == {"idle"}, "not all nodes are idle")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the lab, and with it all jobs and daemons.  May be called twice."""
        self.lab.close()
        for process in self._daemons.values():
            process.wait()
        self._daemons = {}

    def run(
        self,
        command: Sequence[str | Path],
        *,
        host: int = 0,
        timeout: float | None = 120,
        env: Mapping[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command that talks to this Slurm, on a host; one that takes longer ends the lab."""
        return self.lab.run(host, command, timeout=timeout, env={**self.environment, **(env or {})})

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which commands find this Slurm, and MPICH the lab's network."""
        return {**MPICH_OVER_TCP, "SLURM_CONF": f"{NODE}/slurm.conf", "PATH": PATH}

    def states(self) -> list[str]:
        """Return the state of each node: ``idle``, ``mixed``, ``drained``, ..."""
        done = self.run(["sinfo", "--noheader", "--Node", "--format=%T"])
        return done.stdout.split()

    def job(self, number: str | int) -> dict[str, str]:
        """Return what ``scontrol show job`` says: ``JobState``, ``ExitCode``, ..."""
        done = self.run(["scontrol", "--oneliner", "show", "job", str(number)])
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def wait(self, number: str | int, patience: float = 120.0) -> dict[str, str]:
        """Wait until a job has ended; return what is known about it."""
        alive = "PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"
        self._until(lambda: self.job(number)["JobState"] not in alive, "the job runs", patience)
        return self.job(number)

    def processes(self, host: int) -> list[str]:
        """Return the commands of a host's processes besides the daemons."""
        done = self.lab.run(host, ["ps", "-wweo", "comm=,args="])  # whole, whatever COLUMNS is
        ours = (*DAEMONS, "slurmscriptd", "ps ")
        lines = done.stdout.splitlines()
        return [line for line in lines if not line.startswith(ours) and "holder.py" not in line]

    def _configure(self, host: int, key: str) -> None:
        last = self.lab.hosts - 1
        folders = " ".join(f"{NODE}/{name}" for name in ("munge", "spool", "state"))
        gpus = " ".join(f"{NODE}/gpu{n}" for n in range(self.gpus))
        # Slurm wants devices; like /dev/null (1, 3), and of a file system that opens none.
        devices = f"for gpu in {gpus}; do mknod $gpu c 1 3; done"
        self.lab.run(host, ["sh", "-c", f"mkdir -p {folders}; {devices}"])
        conf = CONF.format(
            controller=address(0),
            socket=SOCKET,
            node=NODE,
            names=f"host[0-{last}]",
            addresses=f"10.77.0.[1-{last + 1}]",
            cores=self.cores,
            gpus=self.gpus,
            memory=MEMORY,
            all_memory=self.cores * MEMORY,
        )
        files = {
            "slurm.conf": conf,
            "gres.conf": f"Name=gpu File={NODE}/gpu[0-{self.gpus - 1}]\n",
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
            "plugstack.conf": "",
            "munge/key": key,
        }
        for name, text in files.items():
            write = ["sh", "-c", f"umask 077 && cat > {NODE}/{name}"]
            self.lab.start(host, write, stdin=subprocess.PIPE).communicate(text)

    def _start(self, host: int, command: str) -> None:
        name = command.split()[0]
        self._daemons[host, name] = self.lab.start(
            host,
            ["sh", "-c", f"umask 022; cd / && exec {command} > {NODE}/{name}.out 2>&1"],
            env={**os.environ, **self.environment},
        )

    def _munge_is_there(self) -> bool:
        test = ["test", "-S", SOCKET]
        return not any(self.lab.run(host, test).returncode for host in range(self.lab.hosts))

    def _until(self, true: Callable[[], bool], otherwise: str, patience: float = PATIENCE) -> None:
        """Wait until something is true; a daemon that ends before is an error."""
        limit = time.monotonic() + patience
        while not true():
            ended = [
                which for which, process in self._daemons.items() if process.poll() is not None
            ]
            for host, name in ended:
                said = self.lab.run(host, ["tail", "-n", "3", f"{NODE}/{name}.out"]).stdout
                raise LabError(f"Slurm: {otherwise}; {name} on host{host} ended: {said}")
            if time.monotonic() > limit:
                raise LabError(f"Slurm: {otherwise} after {patience:.0f} s")
            time.sleep(0.1)


def why_no_slurm() -> str | None:
    """Return why Slurm cannot run in a lab here, or None."""
    if missing := [daemon for daemon in (*DAEMONS, "srun") if not shutil.which(daemon, path=PATH)]:
        return (
            f"{', '.join(missing)}: not installed; on Debian or Ubuntu, "
            "`sh benchmarks/netlab/install.sh` installs Slurm and MUNGE"
        )
    return None if os.geteuid() == 0 else "Slurm in a lab needs root"

"""SSH between the hosts of a lab: ``ssh host1 hostname`` works on each, without a password.

    with Lab(hosts=2, rate="1gbit") as lab, SSH(lab):
        print(lab.run(0, ["ssh", "host1", "hostname"]).stdout)

Keys, made anew for each lab, and configuration are in each host's own /tmp/ssh, which it sees as
/etc/ssh; a `~/.ssh` that this machine has is hidden from the hosts, and so is a `~/.bashrc`, which
may take locks that a killed login leaves.  Like any user's, a command that is started over SSH has
the home as its folder, and not the environment of the caller.

It needs root and OpenSSH: `sh benchmarks/netlab/install.sh` installs it on Debian.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping

from .lab import MPICH_OVER_TCP, Lab, LabError

# sshd is in a folder that is not on every user's PATH.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
FOLDER = "/tmp/ssh"  # on each host
PATIENCE = 30.0  # seconds for what takes milliseconds

SERVER = f"""
HostKey {FOLDER}/key
AuthorizedKeysFile {FOLDER}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
MaxStartups 100
"""
CLIENT = f"""
IdentityFile {FOLDER}/key
GlobalKnownHostsFile {FOLDER}/known_hosts
UserKnownHostsFile /dev/null
StrictHostKeyChecking yes
BatchMode yes
ServerAliveInterval 10
ServerAliveCountMax 2
"""
# Each host sees its own files where this machine has its own.
SET_UP = f"""
umask 077
cd {FOLDER}
printf '%s' "$1" > sshd_config
printf '%s' "$2" > ssh_config
printf '%s' "$3" > key
printf '%s' "$4" > key.pub
printf 'host*,10.77.0.* %s' "$4" > known_hosts
mount --bind {FOLDER} /etc/ssh
if [ -d "$5/.ssh" ]; then mount -t tmpfs tmpfs "$5/.ssh"; fi
# A login runs no profile of the user: what one began would outlive the lab.
for file in .bashrc .bash_profile .bash_login .profile .zshenv; do
  if [ -f "$5/$file" ]; then mount --bind /dev/null "$5/$file"; fi
done
mount -t tmpfs tmpfs /run
mkdir /run/sshd
"""


class SSH:
    """An SSH server on every host of an open lab, inside a ``with`` block; ends with the lab.

    Parameters
    ----------
    lab : Lab
    variables : mapping, optional
        What a login on a host has in its environment, as users' profiles set it.

    Raises
    ------
    LabError
        On entry: OpenSSH is missing or does not start; the message says why.
    """

    def __init__(self, lab: Lab, variables: Mapping[str, str] | None = None) -> None:
        self.lab, self.variables = lab, dict(variables or {})
        self._servers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "SSH":
        """Start all servers, and wait until each answers."""
        if reason := why_no_ssh():
            raise LabError(reason)
        make_key = f"mkdir -m 700 {FOLDER}; ssh-keygen -q -t ed25519 -N '' -C lab -f {FOLDER}/key"
        self._on(0, make_key)
        key, public = (self._on(0, f"cat {FOLDER}/{name}") for name in ("key", "key.pub"))
        sshd = shutil.which("sshd", path=PATH)  # it wants an absolute path
        server = SERVER
        if self.variables:
            set_env = (f'"{name}={value}"' for name, value in self.variables.items())
            server += f"SetEnv {' '.join(set_env)}\n"
        for host in range(self.lab.hosts):
            given = server, CLIENT, key, public, os.path.expanduser("~root")
            self._on(host, f"mkdir -p {FOLDER}; {SET_UP}", *given)
            command = f"{sshd} -D -E {FOLDER}/log; exit $?"  # not by exec, so that it can freeze
            self._servers.append(self.lab.start(host, ["sh", "-c", command]))
        for host in range(self.lab.hosts):
            self._wait_for(host)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the lab, and with it the servers and all that was started over them."""
        self.lab.close()
        for server in self._servers:
            server.wait()
        self._servers = []

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which MPICH finds the lab's network."""
        return MPICH_OVER_TCP

    def _on(self, host: int, script: str, *arguments: str) -> str:
        done = self.lab.run(host, ["sh", "-e", "-c", script, "sh", *arguments], timeout=PATIENCE)
        if done.returncode:
            raise LabError(f"SSH on host{host}: {done.stderr.strip()}")
        return done.stdout

    def _wait_for(self, host: int) -> None:
        limit = time.monotonic() + PATIENCE
        command = ["ssh", "-o", "ConnectTimeout=5", f"host{host}", "true"]
        while True:
            try:
                done = self.lab.run(0, command, timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                message = f"SSH: a login on host{host} takes longer than {PATIENCE:.0f} s"
                raise LabError(message) from None
            if not done.returncode:
                return
            if time.monotonic() > limit or self._servers[host].poll() is not None:
                log = self.lab.run(host, ["tail", "-n", "3", f"{FOLDER}/log"]).stdout
                raise LabError(f"SSH: host{host} does not answer: {done.stderr.strip()}; {log}")
            time.sleep(0.05)


def why_no_ssh() -> str | None:
    """Return why SSH cannot run in a lab here, or None."""
    tools = "sshd", "ssh", "ssh-keygen"
    if missing := [tool for tool in tools if not shutil.which(tool, path=PATH)]:
        return (
            f"{', '.join(missing)}: not installed; on Debian or Ubuntu, "
            "`sh benchmarks/netlab/install.sh` installs OpenSSH"
        )
    return None if os.geteuid() == 0 else "SSH in a lab needs root"

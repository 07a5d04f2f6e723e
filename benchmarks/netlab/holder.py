"""Keep the namespaces of a lab's switch or host, as process 1 in them, until the input ends.

    holder.py NAME                        the switch
    holder.py NAME HOSTS [FOLDER ...]     a host

A host gets a /proc, a /tmp and a /dev/shm of its own, and the text HOSTS as /etc/hosts.  Folders
below /tmp and /dev/shm that are listed stay those of the machine.  Prints the process id by which
processes outside know this one.
"""

import ctypes
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

PRIVATE = "/tmp", "/dev/shm"
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 2, 4, 0x1000, 0x4000
MNT_DETACH = 2
libc = ctypes.CDLL(None, use_errno=True)


def main(name: str, hosts: str = "", *folders: str) -> None:
    """Set the machine up, report, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps orphans
    socket.sethostname(name)
    pid = os.readlink("/proc/self")  # this /proc is the machine's
    if hosts:
        make_private(folders)
        replace_hosts(hosts)
        mount("proc", "/proc", "proc")
        show_network()
    print(pid, flush=True)
    sys.stdin.read()


def make_private(folders: tuple[str, ...]) -> None:
    """Mount empty file systems, and in them the folders to be shared."""
    shared = {
        folder: os.open(folder, os.O_PATH)
        for folder in folders
        if any(Path(top) in Path(folder).parents for top in PRIVATE)
    }
    for top in PRIVATE:
        mount("tmpfs", top, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for folder, descriptor in sorted(shared.items()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        mount(f"/proc/self/fd/{descriptor}", folder, flags=MS_BIND | MS_REC)
        os.close(descriptor)


def replace_hosts(text: str) -> None:
    """Put a file over /etc/hosts."""
    file = Path("/tmp/hosts")
    file.write_text(text)
    mount(str(file), "/etc/hosts", flags=MS_BIND)
    file.unlink()


def show_network() -> None:
    """Have /sys list the host's interfaces, by which UCX finds them, where that is allowed."""
    own = Path("/tmp/sys")
    own.mkdir()
    with suppress(OSError):
        mount("sysfs", str(own), "sysfs")
        for folder in "class/net", "devices/virtual/net":
            mount(str(own / folder), f"/sys/{folder}", flags=MS_BIND)
    libc.umount2(bytes(own), MNT_DETACH)
    own.rmdir()


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Call mount(2)."""
    arguments = source.encode(), target.encode(), kind.encode()
    if libc.mount(*arguments, ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}", target)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A process that forks the processes in which functions run.

    check  --fork-->  server  --fork-->  child: imports the function, and calls it
      |                  ^                  |
      |                  +--end, status-----+
      +---------------cases, results--------+

The server imports NumPy, and PyTorch if needed, but runs nothing of the user's: it has neither
threads of its own nor a GPU context, so that a fork is safe, and a child is ready in milliseconds.
It ends with the check's process, however that ends, and takes the children with it.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

from lvxattn.common.processes import adopt_orphans, children, end_with_parent

_REQUEST = 32  # bytes of a request and of an answer
_LATE = 10.0  # seconds after which a server that does not answer has been stopped
_IMPORT = 300.0  # seconds that it may take to import a library, before its first answer
_PROGRAM = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from lvxattn.check.callers.fork_server import main; main(given)"
)


class ForkServer:
    """The server, as the check's process sees it.

    Parameters
    ----------
    preload : str
        A library that all children need, or nothing; one that may be imported before a fork.
    """

    def __init__(self, preload: str) -> None:
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._control, theirs = socket.socketpair()
        given = {"path": sys.path, "preload": preload, "control": theirs.fileno()}
        flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        self._process = subprocess.Popen(
            [sys.executable, *flags, "-P", "-c", _PROGRAM, json.dumps(given)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the check, which then ends its child
        )
        theirs.close()
        atexit.register(self.close)

    def alive(self) -> bool:
        """Whether this process has started the server, and it still answers."""
        ours, closed = os.getpid() == self._owner, self._control.fileno() < 0
        return ours and not closed and self._process.poll() is None

    def fork(self, channel: socket.socket, dump: int) -> int:
        """Fork a child, and return its process id.

        Parameters
        ----------
        channel : socket
            The child's end of a pair.
        dump : int
            File descriptor to which the child's stack is written if it crashes or hangs.

        Raises
        ------
        OSError
            The server has ended.
        """
        with _output() as (out, err):
            return int(self._ask("fork", _IMPORT, [channel.fileno(), dump, out, err]))

    def end(self, pid: int, grace: float) -> int | None:
        """End a child and what it has started.

        Parameters
        ----------
        pid : int
        grace : float
            Seconds to wait for it to end by itself.

        Returns
        -------
        int or None
            Its exit status, or minus its signal's number; None if it had to be killed.
        """
        try:
            answer = self._ask(f"end {pid} {grace}", grace + _LATE)
        except OSError:  # the server has ended, and its children with it
            return None
        return None if answer == "killed" else int(answer)

    def close(self) -> None:
        """End the server and all children."""
        self._control.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: str, seconds: float, fds: list[int] | None = None) -> str:
        with self._lock:
            self._control.settimeout(seconds)
            try:
                socket.send_fds(self._control, [request.encode().ljust(_REQUEST)], fds or [])
                answer = self._control.recv(_REQUEST, socket.MSG_WAITALL)
            except TimeoutError:  # its children end with it
                self._control.close()
                self._process.kill()
                raise
            except BaseException:  # Ctrl-C: the answer would be taken for the next request's
                self._control.close()
                raise
        if not answer:
            raise ConnectionError("the server has ended")
        return answer.decode().strip()


# By what they have imported: one serves all checks of a process, and stays warm between them.
_SERVERS: dict[str, ForkServer] = {}


def server_with(preload: str) -> ForkServer:
    """Return the server of this process that has imported a library; start it if necessary."""
    server = _SERVERS.get(preload)
    if server is None or not server.alive():
        server = _SERVERS[preload] = ForkServer(preload)
    return server


@contextmanager
def _output() -> Iterator[list[int]]:
    """Yield this process's stdout and stderr as they are now, or nothing if they are closed."""
    found = []
    for fd in (1, 2):
        try:
            found.append(os.dup(fd))
        except OSError:
            found.append(os.open(os.devnull, os.O_WRONLY))
    try:
        yield found
    finally:
        for fd in found:
            os.close(fd)


# In the server.


def main(given: dict[str, str]) -> None:
    """Serve until the check's process has ended; in a child, run the function.

    Parameters
    ----------
    given : dict
        What `ForkServer` passes.
    """
    import lvxattn.check  # noqa: F401 - children have it at once
    from lvxattn.check.callers import child

    del sys.argv[1:]
    if given["preload"]:
        import_module(given["preload"])
    adopt_orphans()
    forked = _serve(socket.socket(fileno=int(given["control"])))
    if forked is not None:
        with suppress(EOFError):
            child.run(*forked)


def _serve(control: socket.socket) -> tuple[socket.socket, int] | None:
    """Answer requests; return None in the end, and in a child its channel and file for stacks."""
    forked: set[int] = set()
    server = os.getpid()
    while True:
        request, fds = b"", list[int]()
        with suppress(ConnectionError):  # closed before an answer was read
            request, fds, *_ = socket.recv_fds(control, _REQUEST, 4, socket.MSG_WAITALL)
        word, *rest = request.decode().split() or ["close"]
        if word == "close":
            for pid in forked:
                _kill(pid)
            _end_orphans(set())
            return None
        if word == "fork":
            with warnings.catch_warnings():
                # Of BLAS's threads, which it ends before a fork.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                control.close()
                return _prepared(server, *fds)
            for fd in fds:
                os.close(fd)
            with suppress(OSError):  # the child does it, too: one of both is first
                os.setpgid(pid, pid)
            forked.add(pid)
            answer = str(pid)
        else:
            pid = int(rest[0])
            forked.remove(pid)
            answer = _ended(pid, float(rest[1]))
            _end_orphans(forked)
        with suppress(ConnectionError):
            control.sendall(answer.encode().ljust(_REQUEST))


def _prepared(
    server: int, channel: int, dump: int, out: int, err: int
) -> tuple[socket.socket, int]:
    """Give a child its output, and a process group of its own."""
    os.setpgid(0, 0)
    end_with_parent(server)
    for fd, number in ((out, 1), (err, 2)):
        os.dup2(fd, number)
        os.close(fd)
    return socket.socket(fileno=channel), dump


def _ended(pid: int, grace: float) -> str:
    """Wait for a child, kill what is left of its group, and return its status."""
    end = time.monotonic() + grace
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found or time.monotonic() >= end:
            break
        time.sleep(0.002)
    _kill(pid)
    if found:
        return str(os.waitstatus_to_exitcode(status))
    os.kill(pid, signal.SIGKILL)  # in case that it has left its group
    os.waitpid(pid, 0)
    return "killed"


def _end_orphans(forked: set[int]) -> None:
    """End what ended children have started in groups of their own, and what those have."""
    while orphans := children() - forked:
        for pid in orphans:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)

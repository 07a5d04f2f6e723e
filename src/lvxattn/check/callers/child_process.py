"""Call a function in a process of its own, and survive whatever it does to that."""

import os
import re
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lvxattn.check.callers.fork_server import server_with
from lvxattn.check.callers.messages import MessageError, receive, send
from lvxattn.check.case_arrays import Problem
from lvxattn.check.error_location import users_place
from lvxattn.check.frameworks import Framework
from lvxattn.check.one_call import ContractError, result_shapes
from lvxattn.check.shards import Cut
from lvxattn.check.time_limit import LONGEST, TimeIsUpError, shortened

Array = npt.NDArray[Any]

_IMPORT = 600.0  # seconds that the function's module has
_GRACE = 5.0  # seconds in which a process that has nothing more to do ends
_LATE = 5.0  # seconds after the time limit, in which a child writes its stack
_POLL = 0.02  # seconds
_OUTERMOST = b'  File "<string>", line 1 in <module>\n'  # the last line of a child's stack
_RANKS = 10.0  # seconds in which virtual ranks end one another
# The check's files that call what is the user's, and files of packages that wait for a lock's file.
_CALLERS = ("one_call.py", "import_target.py")
_LOCKS, _NEAR = r"\b(file_baton|filelock|_soft|_unix)\b", 4
_LOCKED = ": it waits for a lock's file, which a run that was killed may have left"
_FIRST = ", in its first call: if that compiles, allow more by time_limit, --time-limit"
# Variables that a launcher gives its ranks: in a child MPI is a world of its own.
_LAUNCHER = re.compile(r"PMI|OMPI_|HYDRA_|HYDI_|MPI_LOCAL")


class RefusedError(Exception):
    """The function cannot be imported in another process."""


class ChildProcess:
    """A function in a process of its own, which is replaced when it ends or hangs.

    Parameters
    ----------
    setup : dict
        ``fn`` and ``backward``, texts for `import_target.load` (backward may also be a bool);
        ``codes``, their `code_digest`, if any; ``ranks``, their number, or 0.
    framework : Framework
    seconds : float
        The limit of a call; after three that exceeded it, a tenth of that.

    Raises
    ------
    RefusedError
    """

    abandoned = 0
    ending = ""

    def __init__(self, setup: dict[str, Any], framework: Framework, seconds: float) -> None:
        environment = {k: x for k, x in os.environ.items() if not _LAUNCHER.match(k)}
        self._setup = {
            **setup,
            "limit": seconds,
            "framework": framework.name,
            "device": framework.device,
            "dtypes": framework.chosen,
            "import": _IMPORT,
            "environment": environment | dict(framework.environment),
            "path": [str(folder) for folder in sys.path],
            "folder": os.getcwd(),
            "numpy_errors": np.geterr(),
        }
        self._preload = framework.preload
        self._seconds, self._late, self._busy, self._first = seconds, 0, False, True
        # Virtual ranks have clocks of their own, and errors that name ranks.
        self._slack = _RANKS if setup["ranks"] else 0
        self._channel: socket.socket | None = None
        self._start()

    def call(
        self, problem: Problem, notes: list[str] | None = None, cut: Cut | None = None
    ) -> dict[str, Array]:
        """Call the function; `Kernel.call` documents results and errors.

        Raises
        ------
        TimeIsUpError
            It did not come back in time; its process was ended.
        ContractError
            Also if it ended its process, or did what the system ends a process for.
        """
        about = {
            "case": asdict(problem.case), "dtype": problem.dtype, "seed": problem.seed,
            "cut": (cut.P, cut.kind) if cut else None,
        }  # fmt: skip
        found, results = self._ask(about, result_shapes(problem))
        if notes is not None:
            notes += found
        return results

    def look_back(self) -> None:
        """Raise a ContractError if the function has changed its last results."""
        if self._channel is not None:
            self._ask({"case": None}, {})

    def close(self) -> None:
        """End the process."""
        if self._channel is None:
            return
        status, _ = self._end(0 if self._busy else _GRACE)
        if status and not self._busy:
            self.ending = f"when all calls were done, the function {_described(status)}"

    def _start(self) -> None:
        self._server = server_with(self._preload)
        self._dump: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _end
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._pid = self._server.fork(theirs, self._dump.fileno())
            except BaseException as error:
                ours.close()
                self._dump.close()
                if isinstance(error, OSError):
                    raise RefusedError(f"fn: no process can be started: {error}") from None
                raise
        self._channel, self._busy, self._first = ours, True, True
        try:
            send(self._channel, self._setup)
            until = time.monotonic() + _IMPORT
            self._wait(self._channel, until)
            answer, _ = receive(self._channel, until + _LATE)
        except TimeoutError:
            place = self._end(0)[1]
            raise RefusedError(f"fn: its import took more than {_IMPORT:g} s{place}") from None
        except (EOFError, MessageError):
            raise RefusedError(f"fn: its import {self._death()}") from None
        except KeyboardInterrupt:
            self._end(0)
            raise
        if "refused" in answer:
            self._end(_GRACE)
            raise RefusedError(answer["refused"])
        self.own_backward: bool = answer["own_backward"]
        self._busy = False

    def _ask(
        self, about: dict[str, Any], shapes: dict[str, tuple[int, ...]]
    ) -> tuple[list[str], dict[str, Array]]:
        """Return the notes and results of a request, or raise the error that it reports."""
        if self._channel is None:
            try:
                self._start()
            except RefusedError as error:
                raise ContractError(f"in a new process, {error}") from None
        assert self._channel is not None
        seconds, self._busy = shortened(self._seconds, self._late), True
        try:
            send(self._channel, about | {"seconds": seconds})
            until = time.monotonic() + seconds + self._slack
            self._wait(self._channel, until)
            answer, results = receive(self._channel, until + _LATE, shapes)
            status, message = str(answer["status"]), str(answer["message"])
            notes = list(map(str, answer["notes"]))
        except TimeoutError:
            self._late += 1
            place = self._end(0)[1]
            first = _FIRST if self._first and _LOCKED not in place else ""
            text = f"did not come back within {seconds:g} s{place}{first}"
            raise TimeIsUpError(text) from None
        except EOFError:
            raise ContractError(f"the function {self._death()}") from None
        except (MessageError, KeyError, TypeError) as error:
            self._end(0)
            raise ContractError(f"the function disturbed its process: {error}") from None
        self._busy = self._first = False
        if status == "unsupported":
            raise NotImplementedError(message)
        if status:
            raise ContractError(message, results)
        return notes, results

    def _wait(self, channel: socket.socket, until: float) -> None:
        """Wait for an answer; when its time is up, until the child has written its stack.

        Raises
        ------
        TimeoutError
        """
        dump = self._dump.fileno()  # shared with the child, and so is its position
        while True:
            now = time.monotonic()
            channel.settimeout(min(max(until - now, _POLL), LONGEST))
            with suppress(TimeoutError):
                with suppress(ConnectionError):  # which `receive` reports
                    channel.recv(1, socket.MSG_PEEK)
                return
            size = os.fstat(dump).st_size
            last = os.pread(dump, len(_OUTERMOST), max(size - len(_OUTERMOST), 0))
            if now >= until and (last == _OUTERMOST or now >= until + _LATE):
                raise TimeoutError

    def _death(self) -> str:
        """Reap a process that has ended, and describe its end."""
        status, place = self._end(1.0)
        return f"{_described(status)}{place}"

    def _end(self, grace: float) -> tuple[int | None, str]:
        """End the process; return its status, and where the function was, if it says so."""
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        status = self._server.end(self._pid, grace)
        with self._dump:
            self._dump.seek(0)
            stack = self._dump.read().decode(errors="replace")
        return status, _place(stack)


def _described(status: int | None) -> str:
    """Describe how a process has ended, by what `ForkServer.end` returns."""
    if status is None:
        return "closed its process's channel"
    if status >= 0:
        return f"ended its process with status {status}"
    names = {x.value: x.name for x in signal.Signals}
    memory = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"ended its process by {names.get(-status, f'signal {-status}')}{memory}"


def _place(stack: str) -> str:
    """Return the user's line in a stack that faulthandler has written, in parentheses, if any.

    And whether it waits for a lock.
    """
    for thread in reversed(re.split(r"hread 0x", stack)):  # an earlier call may have left one
        frames = re.findall(r'^  File "(.*)", line (\d+) in ', thread, re.MULTILINE)
        ours = [n for n, (filename, _) in enumerate(frames) if filename.endswith(_CALLERS)]
        if ours:  # the innermost frames come first
            inside = [(filename, int(line)) for filename, line in frames[: ours[0]]]
            place = users_place(reversed(inside))
            lock = any(re.search(_LOCKS, filename) for filename, _ in inside[:_NEAR])
            return (f" ({place})" if place else "") + (_LOCKED if lock else "")
    return ""

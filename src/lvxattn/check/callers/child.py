"""The process in which a function runs: it draws each case, calls the function, and sends results.

The check's process judges them.  A child knows no truth and no limit, and whatever the function
changes here ends with it.
"""

import contextvars
import faulthandler
import os
import socket
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from lvxattn.check import callers
from lvxattn.check.callers.kernel import Kernel
from lvxattn.check.callers.messages import receive, send
from lvxattn.check.case_arrays import draw
from lvxattn.check.cases import Case
from lvxattn.check.error_location import describe_error, failure_of
from lvxattn.check.frameworks import framework_of
from lvxattn.check.import_target import code_digest, load
from lvxattn.check.shards import Cut
from lvxattn.check.time_limit import LONGEST

Array = npt.NDArray[Any]


def run(channel: socket.socket, dump: int) -> None:
    """Import the function, then answer requests until the channel is closed.

    Parameters
    ----------
    channel : socket
        Its first message is what `child_process.ChildProcess` prepares.
    dump : int
        File descriptor to which the stack is written if the function crashes or hangs.

    Raises
    ------
    EOFError
        The channel is closed.
    """
    callers.inside_child = True
    faulthandler.enable(dump)
    setup, _ = receive(channel)
    os.environ.clear()
    os.environ.update(setup["environment"])
    sys.path[:] = setup["path"]
    np.seterr(**setup["numpy_errors"])
    faulthandler.dump_traceback_later(setup["import"], file=dump)
    try:
        os.chdir(setup["folder"])
        framework = framework_of(setup["framework"], setup["device"])
        framework.chosen = setup["dtypes"]
        fn, backward = _loaded(setup, "fn"), _loaded(setup, "backward")
        kernel = Kernel(fn, framework, backward, setup["limit"], setup["ranks"])
    except Exception as error:
        send(channel, {"refused": str(error)})
        return
    finally:
        faulthandler.cancel_dump_traceback_later()
    send(channel, {"own_backward": kernel.own_backward})
    while True:
        request, _ = receive(channel)
        faulthandler.dump_traceback_later(min(request["seconds"], LONGEST), file=dump)
        answer, results = _answer(kernel, request)
        faulthandler.cancel_dump_traceback_later()
        for stream in (sys.stdout, sys.stderr):  # a later crash would lose what was printed
            with suppress(AttributeError, OSError, ValueError):  # closed by the function
                stream.flush()
        send(channel, answer, results)


def _answer(kernel: Kernel, request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the answer to a request: to call the function, or to look at its last results."""
    notes: list[str] = []

    def work() -> dict[str, Array]:
        if request["case"] is None:
            kernel.look_back()
            return {}
        problem = draw(Case(**request["case"]), request["dtype"], request["seed"])
        return kernel.call(problem, notes, Cut(*request["cut"]) if request["cut"] else None)

    status, message, results = "", "", dict[str, Array]()
    try:
        results = contextvars.copy_context().run(work)
    except Exception as error:
        status, message = failure_of(error)
        results = getattr(error, "results", {})
    except BaseException as error:  # also the function's own KeyboardInterrupt
        status, message = "error", describe_error(error)
    return {"status": status, "message": message, "notes": notes}, results


def _loaded(setup: dict[str, Any], argument: str) -> Any:
    """Import a function, if it is one; refuse one with another code than in the check's process."""
    if not isinstance(setup[argument], str):
        return setup[argument]
    found = load(setup[argument], argument)
    code = setup["codes"].get(argument)
    if code and code != code_digest(found):
        raise ValueError(f"{argument}: {setup[argument]} is another function by now")
    return found

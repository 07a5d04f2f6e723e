"""What a function shares with its process: its life, the working directory, and NumPy."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np

from lvxattn.check.one_call import ContractError

T = TypeVar("T")

_MODULES = (np, np.linalg, np.random)
_LEAVE = os._exit


class ExitError(SystemExit):
    """The function called `os._exit`."""


def call_watched(work: Callable[[], T]) -> T:
    """Return what work returns; restore the working directory and the names of NumPy.

    One call at a time: they belong to the process.  What a call has changed that was abandoned, the
    next one restores, or `restore`.

    Raises
    ------
    ContractError
        Work changed one of them.
    ExitError
        Work called `os._exit`, which would have ended the check.
    Exception
        What work raises.
    """
    global _latest
    restore()
    mine = _latest = _Surroundings()
    changes: list[str] = []
    try:
        result = work()
    finally:
        if _latest is mine:  # otherwise this call was abandoned
            changes = restore()
    if changes:
        raise ContractError("; ".join(changes))
    return result


def restore() -> list[str]:
    """Restore what the latest call has changed, even if it is still running; return what it was."""
    global _latest
    latest, _latest = _latest, None
    vars(os)["_exit"] = _LEAVE
    return latest.restore() if latest else []


class _Surroundings:
    """The working directory and the names of NumPy; with them, `os._exit` raises an error."""

    def __init__(self) -> None:
        self._folder, self._owner = _folder(), os.getpid()
        self._names = [(module, dict(vars(module))) for module in _MODULES]
        vars(os)["_exit"] = self._refuse

    def restore(self) -> list[str]:
        """Restore them, and return what was changed."""
        changes = []
        if _folder() != self._folder:
            changes.append(f"the working directory was changed to {_folder()}")
            with suppress(OSError):
                os.chdir(self._folder)
        for module, before in self._names:
            now = vars(module)
            for name in [name for name, x in before.items() if now.get(name) is not x]:
                changes.append(f"{module.__name__}.{name} was replaced")
                setattr(module, name, before[name])
        return changes

    def _refuse(self, status: int) -> None:
        if os.getpid() != self._owner:  # of a process that was forked
            _LEAVE(status)
        raise ExitError(f"os._exit({status}) would have ended the check")


_latest: _Surroundings | None = None  # of the call that is running, or was abandoned


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""

"""What a function shares with its process: its life, the working directory, and NumPy."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import numpy as np

from lvxattn.check.call_kernel import ContractError

T = TypeVar("T")

_MODULES = (np, np.linalg, np.random)


class ExitError(SystemExit):
    """The function called `os._exit`."""


def call_watched(work: Callable[[], T]) -> T:
    """Return what work returns; restore the working directory and the names of NumPy.

    One call at a time: they belong to the process.

    Raises
    ------
    ContractError
        Work changed one of them.
    ExitError
        Work called `os._exit`, which would have ended the check.
    Exception
        What work raises.
    """
    folder, names = _folder(), [(module, dict(vars(module))) for module in _MODULES]
    changes: list[str] = []
    try:
        with _kept_alive():
            result = work()
    finally:
        if _folder() != folder:
            changes.append(f"the working directory was changed to {_folder()}")
            with suppress(OSError):
                os.chdir(folder)
        for module, before in names:
            now = vars(module)
            for name in [name for name, x in before.items() if now.get(name) is not x]:
                changes.append(f"{module.__name__}.{name} was replaced")
                setattr(module, name, before[name])
    if changes:
        raise ContractError("; ".join(changes))
    return result


@contextmanager
def _kept_alive() -> Iterator[None]:
    """Let `os._exit` raise an error."""
    leave, owner = os._exit, os.getpid()

    def refuse(status: int) -> None:
        if os.getpid() != owner:  # of a process that was forked
            leave(status)
        raise ExitError(f"os._exit({status}) would have ended the check")

    vars(os)["_exit"] = refuse
    try:
        yield
    finally:
        vars(os)["_exit"] = leave


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""

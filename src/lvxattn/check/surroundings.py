"""What a function shares with its process and must not change: the working directory and NumPy."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np

from lvxattn.check.call_kernel import ContractError

T = TypeVar("T")

_MODULES = (np, np.linalg, np.random)


def call_watched(work: Callable[[], T]) -> T:
    """Return what work returns; restore the working directory and the names of NumPy.

    One call at a time: they belong to the process.

    Raises
    ------
    ContractError
        Work changed one of them.
    Exception
        What work raises.
    """
    folder, names = _folder(), [(module, dict(vars(module))) for module in _MODULES]
    changes: list[str] = []
    try:
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


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""

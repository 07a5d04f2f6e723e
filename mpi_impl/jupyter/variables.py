"""Variables on their way between a notebook and its ranks, pickled in a file."""

import pickle
from pathlib import Path
from types import FunctionType
from typing import Any

from lvxattn.mpi_impl.jupyter.report import RefusedError

_ADVICE = {
    "--take": "which only the notebook has; define it in the cell, or in a module",
    "--give": "which only the cell has; define it in a module",
}


def store(path: Path, variables: dict[str, Any], option: str) -> None:
    """Write variables to a file.

    Parameters
    ----------
    path : Path
    variables : dict
    option : {"--take", "--give"}
        Why they are sent: to the ranks, or back.

    Raises
    ------
    RefusedError
        One cannot be pickled.
    """
    with open(path, "wb") as file:
        # One pickler for all of them: two names of one array stay one array.
        pickler = _Pickler(file)
        pickler.dump(list(variables))
        for name, value in variables.items():
            try:
                pickler.dump(value)
            except _LocalError as error:
                raise RefusedError(
                    f"{option}: {name} needs the {error}, {_ADVICE[option]}"
                ) from None
            except Exception as error:  # whatever a type raises that cannot be pickled
                raise RefusedError(f"{option}: {name} cannot be pickled: {_told(error)}") from None


def load(path: Path, option: str) -> dict[str, Any]:
    """Read what `store` has written.

    Raises
    ------
    RefusedError
        One cannot be unpickled, as when its class cannot be imported here.
    """
    with open(path, "rb") as file:
        unpickler = pickle.Unpickler(file)
        variables = {}
        for name in unpickler.load():
            try:
                variables[name] = unpickler.load()
            except Exception as error:
                raise RefusedError(
                    f"{option}: {name} cannot be unpickled: {_told(error)}"
                ) from None
    return variables


class _LocalError(Exception):
    """A function or a class that another process could not import."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Refuse what is defined in ``__main__``: over there that is another module."""
        if isinstance(value, type | FunctionType) and value.__module__ == "__main__":
            kind = "class" if isinstance(value, type) else "function"
            raise _LocalError(f"{kind} {value.__qualname__}")
        return NotImplemented


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

"""Checks of the exercises in the notebooks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType


@contextmanager
def check(what: str, hide: str = "", hide_packages: str = "") -> Iterator[None]:
    """Print whether the reader's code passes the assertions within; never raise for it.

    Parameters
    ----------
    what : str
        What the assertions show if they pass.
    hide : str
        Names of the notebook, separated by spaces, that do not exist within: the reader's code can
        then compute with its arguments alone.
    hide_packages : str
        Packages, separated by spaces, that cannot be imported within; the notebook's names of their
        modules, functions and classes do not exist, either.
    """
    names, modules = vars(sys.modules["__main__"]), sys.modules
    if missing := [name for name in hide.split() if name not in names]:
        print(f"not yet: run the cells above first; there is no {', '.join(missing)}")
        with suppress(Exception):
            yield  # a context manager cannot skip what is within
        return
    packages = hide_packages.split()
    imported = {name: module for name, module in modules.items() if name.split(".")[0] in packages}
    hidden = {
        name: names.pop(name)
        for name, value in list(names.items())
        if name in hide.split() or _home(value) in packages
    }
    modules.update(dict.fromkeys(imported))  # type: ignore[arg-type]  # None refuses an import
    try:
        yield
    except Exception as error:  # from the reader's code, or an assertion about it
        print(f"not yet: {error}" if str(error) else f"not yet: {type(error).__name__}")
        if isinstance(error, NameError) and error.name in hidden:
            print("The check hides the notebook's own: compute with the arguments alone.")
        if isinstance(error, ImportError) and error.name in imported:
            print(f"The check hides {', '.join(packages)}: use the arguments alone.")
    else:
        print(f"right: {what}")
    finally:
        names.update(hidden)
        modules.update(imported)


def _home(value: object) -> str:
    """Return the package of a module, function or class; empty for other objects."""
    if isinstance(value, ModuleType):
        return value.__name__.split(".")[0]
    return str(value.__module__).split(".")[0] if isinstance(value, FunctionType | type) else ""

"""Functions and their names: ``package.module:function``."""

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from types import CodeType, ModuleType
from typing import Any


def load(text: str, argument: str) -> Callable[..., Any]:
    """Import a module and return a function of it.

    Modules in the current folder are found as well, after all others.

    Parameters
    ----------
    text : str
        ``"package.module:function"``, or ``"module:Class.method"``.
    argument : str
        Its name in error messages.

    Raises
    ------
    ValueError
        There is no such module, it cannot be imported, it has no such name, or that is not
        callable; in one line.
    """
    module_name, colon, path = text.partition(":")
    wrong = _misspelt(module_name, colon, path)
    if wrong:
        raise ValueError(f"{argument}: expected package.module:function, got {text!r}{wrong}")
    found: Any = _imported(module_name, argument)
    at = module_name
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{argument}: {at} has no {name!r}{_near(name, found)}")
        found, at = getattr(found, name), f"{at}{'.' if ':' in at else ':'}{name}"
    if not callable(found):
        raise ValueError(f"{argument}: expected a function, and {at} is {found!r:.60}")
    function: Callable[..., Any] = found
    return function


def name_of(fn: Any) -> str:
    """Return a function's ``module:name``."""
    while not hasattr(fn, "__qualname__") and callable(getattr(fn, "func", None)):
        fn = fn.func  # functools.partial
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    return f"{getattr(fn, '__module__', None) or '?'}:{name}"


def target_of(fn: Callable[..., Any]) -> str | None:
    """Return the text by which `load` finds a function in another process, if there is one."""
    name = name_of(fn)
    module, _, path = name.partition(":")
    found: Any = None if module == "__main__" else sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return name if found is fn else None


def code_digest(fn: Callable[..., Any]) -> str:
    """Return a digest of a function's compiled code, alike in all processes; empty if it has none.

    It includes the first line's number, and thus also the code's place in its file.
    """
    code = getattr(fn, "__code__", None)
    return _digest(code) if isinstance(code, CodeType) else ""


def _digest(constant: Any) -> str:
    """Return a digest of code or a constant of it."""
    if isinstance(constant, CodeType):
        plain = (constant.co_code, constant.co_names, constant.co_varnames, constant.co_firstlineno)
        text = repr((plain, _digest(constant.co_consts)))
    elif isinstance(constant, tuple):
        text = repr([_digest(x) for x in constant])
    elif isinstance(constant, frozenset):  # its order is another in each process
        text = repr({"set": sorted(_digest(x) for x in constant)})
    else:
        text = repr(constant)
    return hashlib.sha256(text.encode()).hexdigest()


def _misspelt(module: str, colon: str, path: str) -> str:
    """Return a hint at the correct spelling; empty if the text is well-formed."""
    stem, ending = os.path.splitext(module)
    if ending == ".py" or os.sep in module:
        folder, name = os.path.split(stem if ending == ".py" else module)
        start = f"in {folder}, " if folder else ""
        return f": {start}write {name}:{path or 'FUNCTION'}"
    if not colon and "." in module:
        package, _, name = module.rpartition(".")
        return f": write {package}:{name}"
    names = [*module.split("."), *path.split(".")]
    return "" if all(name.isidentifier() for name in names) else ": it is no such name"


def _imported(name: str, argument: str) -> ModuleType:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may even exit
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            where = f" (looked in {os.getcwd()} too)" if missing == name.partition(".")[0] else ""
            raise ValueError(f"{argument}: no module {missing!r}{where}") from None
        text = " ".join(str(error).split())
        text = f"{type(error).__name__}: {text:.200} ({_where(error)})"
        raise ValueError(f"{argument}: {name} cannot be imported: {text}") from None


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    return f"{own[-1].filename}:{own[-1].lineno}"


def _near(name: str, owner: Any) -> str:
    """Return a suggestion of similar names; empty if there are none."""
    names = [x for x in dir(owner) if not x.startswith("_") and callable(getattr(owner, x, None))]
    near = get_close_matches(name, names, 3)
    return f": did you mean {' or '.join(near)}?" if near else ""

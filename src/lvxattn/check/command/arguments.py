"""What the user gave, looked at before anything is done."""

import argparse
from argparse import Namespace
from collections.abc import Callable
from math import isfinite
from typing import Any, NoReturn

from lvxattn.check.frameworks import Framework, framework_of
from lvxattn.check.import_target import load
from lvxattn.cli import arguments
from lvxattn.cli.arguments import UsageError, try_to_write
from lvxattn.common.validation import FLOATING


class Parser(arguments.Parser):
    """A parser whose errors do not speak of ranks."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError(f"{self.prog}: error: {message}")


def dtypes(text: str) -> tuple[str, ...]:
    """Read names of dtypes, separated by commas."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FLOATING:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(FLOATING)}, separated by commas, got {name!r}"
            )
    return names


def seconds(text: str) -> float:
    """Read a number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (number > 0 and isfinite(number)):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return number


def framework_in(options: Namespace) -> Framework:
    """Return the framework, which must be there and have the dtypes.

    Raises
    ------
    UsageError
    """
    try:
        arrays = framework_of(options.framework, options.device)
    except ValueError as error:
        raise UsageError(f"--{error}") from None  # it begins with framework: or device:
    except ImportError as error:
        raise UsageError(f"--{error}") from None
    for dtype in options.dtypes or ():
        if dtype not in arrays.dtypes:
            known = ", ".join(arrays.dtypes)
            raise UsageError(
                f"--dtypes: expected some of {known} with {arrays.name} here, got {dtype!r}"
            )
    return arrays


def functions_in(
    options: Namespace,
) -> tuple[Callable[..., Any], bool | Callable[..., Any]]:
    """Return the function, and its backward as `suite.check` takes it.

    Raises
    ------
    UsageError
    """
    try:
        fn = load(options.function, "function")
        if options.backward is not None:
            return fn, load(options.backward, "--backward")
    except ValueError as error:
        raise UsageError(str(error)) from None
    return fn, not options.no_backward


def look_at_file(path: str | None, argument: str) -> None:
    """Find out whether a file can be written; one that is there is left as it is.

    Raises
    ------
    UsageError
    """
    if path is None or path == "-":
        return
    try:
        try_to_write(path)
    except OSError as error:
        raise UsageError(f"{argument}: {path} cannot be written: {error.strerror}") from None

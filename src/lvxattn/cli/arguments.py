"""What the commands share: a parser that speaks once, and the numbers that arguments may be."""

import argparse
import os
from errno import EACCES
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class UsageError(ValueError):
    """The command line makes no sense; the same on all ranks."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors and help texts reach the terminal once, not once a rank.

    Attributes
    ----------
    speaks : bool
        Whether this process is the one to print help texts.  Of the class, so that the parsers of
        subcommands have it too: a command line overrides it in a class of its own.
    """

    speaks = True

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError(f"{self.prog}: error: {message} (on all ranks)")

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        """Print on one rank."""
        if self.speaks:
            super()._print_message(message, file)


def try_to_write(path: str | Path) -> None:
    """Find out whether a file can be written; one that is there is left as it is.

    A pipe or a device is not opened: whoever opens a pipe waits for its reader.

    Raises
    ------
    OSError
        It cannot.
    """
    file = Path(os.path.realpath(path))  # what is made and removed is never a link
    there = file.exists()
    if there and not file.is_file() and not file.is_dir():
        if not os.access(file, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES), str(path))
        return
    with file.open("ab"):
        pass
    if not there:
        file.unlink(missing_ok=True)  # another rank may have looked, too


def writable(text: str) -> str:
    """Read the name of a file that can be written."""
    try:
        try_to_write(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from None
    return text


def positive(text: str) -> int:
    """Read a whole number from 1 up."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Read a whole number from 0 up."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
    return number

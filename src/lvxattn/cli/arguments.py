"""Parts shared by the parsers of all commands: errors, output on one rank, types of arguments."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lvxattn.cli.tensors import InputError
from lvxattn.common.new_file import check_target

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

AddCommand = Callable[..., argparse.ArgumentParser]
"""``add(name, run, **texts)`` adds a command, and returns its parser."""


class UsageError(ValueError):
    """Invalid command line; the same on all ranks."""


class Parser(argparse.ArgumentParser):
    """A parser that raises errors, and prints help texts on one rank only.

    Attributes
    ----------
    speaks : bool
        Whether this process prints help texts.  A class attribute, so that the parsers of
        subcommands have it too: a command line overrides it in a subclass.
    """

    speaks = True

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing and exiting."""
        raise UsageError(f"{self.prog}: error: {message} (on all ranks)")

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        """Print on one rank."""
        if self.speaks:
            super()._print_message(message, file)


def adder(parser: Parser) -> AddCommand:
    """Return a function that adds commands to a parser.

    A command's function is the attribute ``run`` of the parsed options.
    """
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int], **texts: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, allow_abbrev=False, **texts)
        command.set_defaults(run=run)
        return command

    return add


def check_same_line(lines: Sequence[Sequence[str]]) -> None:
    """Raise UsageError if ranks have other command lines than rank 0.  Not collective."""
    for rank, line in enumerate(lines):
        if line != lines[0]:
            expected, got = (shlex.join(words) or "nothing" for words in (lines[0], line))
            raise UsageError(
                f"lvxattn: error: command line: expected rank 0's, {expected}, got {got} "
                f"(on rank {rank} of {len(lines)})"
            )


def refuse(message: str, rank: int) -> int:
    """Print an error about the input on rank 0.  Not collective.

    Parameters
    ----------
    message : str
    rank : int
        This rank.

    Returns
    -------
    int
        The exit status for bad input, 2.
    """
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    return 2


def check_output(option: str, text: str) -> None:
    """Raise if the file that an option names cannot be written.

    Parameters
    ----------
    option, text : str

    Raises
    ------
    InputError
    """
    problem = cannot_write(text)
    if problem:
        raise InputError(f"{option}: {problem}")


def writable(text: str) -> str:
    """Parse the name of a file that can be written."""
    problem = cannot_write(text)
    if problem:
        raise argparse.ArgumentTypeError(problem)
    return text


def cannot_write(path: str | Path) -> str:
    """Return why a file cannot be written, before any work is done; empty if it can."""
    try:
        check_target(path)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return ""


def between(low: float, high: float, expected: str) -> Callable[[str], float]:
    """Return a function that parses a number between two limits, both excluded."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = nan
        if not low < number < high:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return number

    return parse


def a_grid(text: str) -> tuple[int, int]:
    """Parse the numbers of a grid, as of 4x2."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected two numbers, as in 4x2, got {text!r}")
    return int(found[1]), int(found[2])


def positive(text: str) -> int:
    """Parse a whole number from 1 up."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Parse a whole number from 0 up."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number < 2**63:  # larger ones fit into no array's shape, nor into a seed
        limit = "" if number < least else ", below 2**63"
        expected = f"expected a whole number from {least} up{limit}"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r:.40}")
    return number

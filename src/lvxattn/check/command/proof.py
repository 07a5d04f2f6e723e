"""``self-test``: the oracle against wrong kernels, which it must catch, and right ones."""

from argparse import Namespace
from typing import Any

from lvxattn.check.command.arguments import look_at_file
from lvxattn.cli.arguments import positive


def add_self_test(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "self-test",
        help="hold the oracle against wrong kernels, which it must catch, and right ones",
        description="Hold the oracle against wrong kernels, which it must catch, and right ones.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=positive, metavar="N", help="problems of each case")
    parser.add_argument("--out", metavar="FILE", help="write the matrix of cases and kernels")
    parser.set_defaults(run=_self_test)


def _self_test(options: Namespace) -> int:
    look_at_file(options.out, "--out")
    # Looked up now, so that a test can put another in its place.
    from lvxattn.check.self_test import (
        self_test,
    )

    given = {"seeds": options.seeds, "path": options.out}
    found = self_test(**{name: x for name, x in given.items() if x is not None})
    print(found, flush=True)
    return 0 if found.passed else 1

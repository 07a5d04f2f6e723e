"""``golden``: cases with their fp64 results in files, written and verified."""

import sys
from argparse import Namespace
from typing import Any

from lvxattn.check.cases import SUITES
from lvxattn.check.golden_data import SHIPPED, golden_names, verify_golden, write_golden
from lvxattn.cli.arguments import UsageError, natural
from lvxattn.cli.tensors import InputError


def add_golden(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "golden",
        help="cases with their fp64 results in files",
        description="Write the cases with their fp64 results, or verify such files.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="write a safetensors file a case, a manifest")
    what.add_argument(
        "--verify",
        nargs="?",
        const=str(SHIPPED),
        metavar="DIR",
        help="are these files (default: the package's) as they were written, and still right?",
    )
    parser.add_argument("--suite", choices=SUITES, help="with --out (default: quick)")
    parser.add_argument("--seed", type=natural, metavar="N", help="with --out (default: 0)")
    parser.set_defaults(run=_golden)


def _golden(options: Namespace) -> int:
    try:
        return _write(options) if options.out is not None else _verify(options)
    except InputError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        argument = "--verify" if options.out is None else "--out"
        raise UsageError(f"{argument}: {error.filename}: {error.strerror}") from None


def _write(options: Namespace) -> int:
    manifest = write_golden(options.out, options.suite or "quick", options.seed or 0)
    size = sum(entry["bytes"] for entry in manifest["cases"].values())
    print(f"{options.out}: {len(manifest['cases'])} cases, {size / 1e6:.2f} MB")
    for name, why in manifest["left_out"].items():
        print(f"  left out: {name}: {why}")
    return 0


def _verify(options: Namespace) -> int:
    for name in ("suite", "seed"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name}: goes with --out")
    complaints = verify_golden(options.verify)
    for line in complaints:
        print(f"lvxattn check golden: {line}", file=sys.stderr)
    if not complaints:
        count = len(golden_names(options.verify))
        print(f"{count} cases: checksums right, results within the limit for float64")
    return 1 if complaints else 0

"""The parser of ``python -m lvxattn.check``, and the subcommands ``golden`` and ``self-test``."""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from math import inf
from typing import NoReturn

from lvxattn.check.cases import DTYPES, SUITES
from lvxattn.check.command.checking import check_function, list_cases, run_case, try_file
from lvxattn.check.command.launched import check_launcher, rank_of
from lvxattn.check.frameworks import NAMES
from lvxattn.check.golden_data import SHIPPED, golden_names, verify_golden, write_golden
from lvxattn.check.self_test import self_test
from lvxattn.check.shards import CUTS, KINDS
from lvxattn.cli import arguments
from lvxattn.cli.arguments import UsageError, between, natural, positive
from lvxattn.cli.tensors import InputError

PROG = "lvxattn check"
_MORE = "also: golden --out DIR, golden --verify [DIR], self-test; each has a --help of its own"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.  With ``--distributed`` collective: every rank calls this.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; default: those of the process.

    Returns
    -------
    int
        0, 1 if something failed, or 2 for an invalid command line; the same on all ranks.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    rank = rank_of(argv)
    try:
        options = _parser(argv, rank).parse_args(argv)
        check_launcher(argv)
        status: int = options.run(options)
        return status
    except UsageError as error:
        if rank == 0:
            text = str(error)
            text = text if text.startswith(PROG) else f"{PROG}: error: {text}"
            print(text, file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr, flush=True)
        return 130


class _Parser(arguments.Parser):
    """A parser whose errors do not mention ranks."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError(f"{self.prog}: error: {message}")


def _parser(argv: Sequence[str], rank: int) -> _Parser:
    class Speaking(_Parser):
        speaks = rank == 0

    if argv and argv[0] in ("golden", "self-test"):
        parser = Speaking(PROG, allow_abbrev=False)
        _add_subcommands(parser)
        return parser
    parser = Speaking(
        PROG,
        usage=f"{PROG} [module:function] [options]",
        description="Check an attention function against the reference.",
        epilog=_MORE,
        allow_abbrev=False,
    )
    parser.add_argument(
        "function",
        nargs="?",
        metavar="module:function",
        help="fn(q, k, v, *, scale, mask) -> out or (out, lse)",
    )
    what = parser.add_argument_group("what is checked")
    what.add_argument("--suite", choices=SUITES, help="(default: quick)")
    what.add_argument(
        "--dtypes",
        type=partial(_names, known=DTYPES),
        metavar="NAME,...",
        help="of float64, float32, float16, bfloat16 (default: the framework's usual ones)",
    )
    what.add_argument(
        "--framework", choices=NAMES, help="array library of the function (default: numpy)"
    )
    what.add_argument("--device", metavar="NAME", help="where the arrays are, such as cuda")
    what.add_argument("--no-backward", action="store_true", help="do not check gradients")
    what.add_argument(
        "--backward",
        metavar="module:function",
        help="fn(dout, q, k, v, out, lse, *, scale, mask) -> (dq, dk, dv), unless it is an "
        "attribute of the function",
    )
    what.add_argument("--seeds", type=positive, metavar="N", help="problems per case (default: 1)")
    what.add_argument(
        "--time-limit",
        type=between(0, inf, "a number of seconds above 0"),
        metavar="S",
        help="seconds per case (default: 30)",
    )
    what.add_argument(
        "--distributed",
        action="store_true",
        help="fn(q, k, v, comm, *, scale, mask) gets the rank's shard; start it under mpiexec -n P "
        "python -m mpi4py, or torchrun",
    )
    what.add_argument(
        "--cuts",
        type=partial(_names, known=KINDS),
        metavar="KIND,...",
        help=f"how --distributed cuts problems: of {', '.join(KINDS)} (default: "
        f"{', '.join(CUTS)}); divisible is for functions that take nothing but equal shards",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write the full report as JSON")
    output.add_argument("--quiet", action="store_true", help="print nothing but errors")
    single = parser.add_argument_group("cases")
    single.add_argument("--list", action="store_true", help="list the cases of both suites")
    single.add_argument(
        "--case", metavar="NAME", help="only this case, in detail; also without a function"
    )
    single.add_argument("--seed", type=natural, metavar="N", help="of that case (default: 0)")
    single.add_argument(
        "--save",
        metavar="FILE",
        help="write that case's inputs, correct results and returned results as safetensors",
    )
    parser.set_defaults(run=_run)
    return parser


def _names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Parse names, separated by commas."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(known)}, separated by commas, got {name!r}"
            )
    return names


def _run(options: Namespace) -> int:
    _validate(options)
    if options.list:
        return list_cases()
    return run_case(options) if options.case is not None else check_function(options)


def _validate(options: Namespace) -> None:
    """Reject arguments that exclude one another."""
    if options.function is None and not options.list and options.case is None:
        raise UsageError("expected module:function, or --list, or --case NAME")
    if options.case is None:
        for name, hint in (("seed", "; --seeds N is their number"), ("save", "")):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name}: goes with --case NAME{hint}")
    else:
        for name in ("suite", "seeds", "distributed"):
            if getattr(options, name):
                raise UsageError(f"--{name}: does not go with --case")
    if options.cuts and not options.distributed:
        raise UsageError("--cuts: goes with --distributed")
    if options.no_backward and options.backward:
        raise UsageError("--backward: does not go with --no-backward")
    if options.function is None and not options.list:
        for name in ("json", "backward"):
            if getattr(options, name):
                raise UsageError(f"--{name}: needs a function, as module:function")


def _add_subcommands(parser: _Parser) -> None:
    commands = parser.add_subparsers(required=True)
    golden = commands.add_parser(
        "golden",
        help="cases with their fp64 results in files",
        description="Write the cases with their fp64 results, or verify such files.",
        allow_abbrev=False,
    )
    what = golden.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--out", metavar="DIR", help="write one safetensors file per case, and a manifest"
    )
    what.add_argument(
        "--verify",
        nargs="?",
        const=str(SHIPPED),
        metavar="DIR",
        help="verify that files (default: the package's) are intact, and their results correct",
    )
    golden.add_argument("--suite", choices=SUITES, help="with --out (default: quick)")
    golden.add_argument("--seed", type=natural, metavar="N", help="with --out (default: 0)")
    golden.set_defaults(run=_golden)
    test = commands.add_parser(
        "self-test",
        help="run the oracle on wrong kernels, which it must catch, and on correct ones",
        description="Run the oracle on wrong kernels, which it must catch, and on correct ones.",
        allow_abbrev=False,
    )
    test.add_argument(
        "--seeds", type=positive, default=2, metavar="N", help="problems per case (default: 2)"
    )
    test.add_argument("--out", metavar="FILE", help="write the matrix of cases and kernels")
    test.set_defaults(run=_self_test)


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
    wrong = verify_golden(options.verify)
    for line in wrong:
        print(f"lvxattn check golden: {line}", file=sys.stderr)
    if not wrong:
        count = len(golden_names(options.verify))
        print(f"{count} cases: checksums correct, results within the limit for float64")
    return 1 if wrong else 0


def _self_test(options: Namespace) -> int:
    try_file(options.out, "--out")
    try:
        found = self_test(seeds=options.seeds, path=options.out)
    except OSError as error:
        raise UsageError(f"--out: {error.filename}: {error.strerror}") from None
    print(found, flush=True)
    return 0 if found.passed else 1

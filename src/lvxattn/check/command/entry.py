"""The parser, and what is called."""

import sys
from argparse import Namespace
from collections.abc import Sequence

from lvxattn.check.cases import SUITES
from lvxattn.check.command.arguments import Parser, dtypes, seconds
from lvxattn.check.command.checking import check_function
from lvxattn.check.command.golden import add_golden
from lvxattn.check.command.listing import list_cases
from lvxattn.check.command.one_case import replay
from lvxattn.check.command.proof import add_self_test
from lvxattn.check.command.ranks import check_launcher, rank_of
from lvxattn.check.frameworks import NAMES
from lvxattn.cli.arguments import UsageError, natural, positive

PROG = "lvxattn check"
_MORE = "also: golden --out DIR, golden --verify [DIR], self-test; each has a --help of its own"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.  With ``--distributed`` collective: every rank calls this.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process unless given.

    Returns
    -------
    int
        0, or 1 if something failed, or 2 if the command line makes no sense; the same on all ranks.
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


def _parser(argv: Sequence[str], rank: int) -> Parser:
    class Speaking(Parser):
        speaks = rank == 0

    if argv and argv[0] in ("golden", "self-test"):
        parser = Speaking(PROG, allow_abbrev=False)
        commands = parser.add_subparsers(required=True)
        add_golden(commands)
        add_self_test(commands)
        return parser
    parser = Speaking(
        PROG,
        usage=f"{PROG} [module:function] [options]",
        description="Hold an attention function against the reference.",
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
        type=dtypes,
        metavar="NAME,...",
        help="of float64, float32, float16, bfloat16 (default: the framework's usual ones)",
    )
    what.add_argument(
        "--framework", choices=NAMES, help="whose arrays the function gets (default: numpy)"
    )
    what.add_argument("--device", metavar="NAME", help="where they are, such as cuda")
    what.add_argument("--no-backward", action="store_true", help="leave gradients out")
    what.add_argument(
        "--backward",
        metavar="module:function",
        help="fn(dout, q, k, v, out, lse, *, scale, mask) -> (dq, dk, dv), unless it is an "
        "attribute of the function",
    )
    what.add_argument(
        "--seeds", type=positive, metavar="N", help="problems of each case (default: 1)"
    )
    what.add_argument(
        "--time-limit", type=seconds, metavar="S", help="seconds for a case (default: 30)"
    )
    what.add_argument(
        "--distributed",
        action="store_true",
        help="fn(q, k, v, comm, *, scale, mask) gets the rank's share; start it under mpiexec -n P "
        "python -m mpi4py, or torchrun",
    )
    said = parser.add_argument_group("what is said")
    said.add_argument("--json", metavar="FILE", help="write everything that was found")
    said.add_argument("--quiet", action="store_true", help="print nothing but errors")
    single = parser.add_argument_group("cases")
    single.add_argument("--list", action="store_true", help="show the cases of both suites")
    single.add_argument(
        "--case", metavar="NAME", help="only this one, and all about it; also without a function"
    )
    single.add_argument("--seed", type=natural, metavar="N", help="of that case (default: 0)")
    single.add_argument(
        "--save",
        metavar="FILE",
        help="write that case's tensors as safetensors: what goes in, what is right, what came",
    )
    parser.set_defaults(run=_run)
    return parser


def _run(options: Namespace) -> int:
    _look(options)
    if options.list:
        return list_cases()
    return replay(options) if options.case is not None else check_function(options)


def _look(options: Namespace) -> None:
    """Refuse arguments that do not go together."""
    if options.function is None and not options.list and options.case is None:
        raise UsageError("expected module:function, or --list, or --case NAME")
    if options.case is None:
        for name, meant in (("seed", "; --seeds N says how many"), ("save", "")):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name}: goes with --case NAME{meant}")
    else:
        for name in ("suite", "seeds", "distributed"):
            if getattr(options, name):
                raise UsageError(f"--{name}: does not go with --case")
    if options.no_backward and options.backward:
        raise UsageError("--backward: does not go with --no-backward")
    if options.function is None and not options.list:
        for name in ("json", "backward"):
            if getattr(options, name):
                raise UsageError(f"--{name}: needs a function, as module:function")

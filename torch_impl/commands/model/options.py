"""The command line of ``model``."""

import argparse

from lvxattn.cli.arguments import natural, positive
from lvxattn.common.handshake import AUTO, SCHEDULES
from lvxattn.torch_impl.commands.model.kinds import KINDS, SIZES

DTYPES = "float32", "bfloat16", "float16"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``model`` to a parser."""
    what = parser.add_argument_group("the model and its input")
    what.add_argument("--model", choices=tuple(KINDS), required=True, help=", ".join(KINDS))
    what.add_argument(
        "--size", choices=SIZES,
        help="of a model of random weights: tiny, small (below 100 M parameters), or full, that of "
        "the published model (default: tiny)",
    )  # fmt: skip
    what.add_argument(
        "--weights", metavar="FOLDER", help="a model that save_pretrained wrote; never downloaded"
    )
    what.add_argument(
        "--frames", type=positive, default=8, metavar="N",
        help="images, or frames of whisper's spectrogram (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--text-tokens", type=positive, default=32, metavar="N", help="(default: %(default)s)"
    )
    what.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="(default: %(default)s)")
    what.add_argument("--seed", type=natural, default=0, metavar="N", help="of weights and input")

    work = parser.add_argument_group("computation (default: one forward and backward)")
    either = work.add_mutually_exclusive_group()
    either.add_argument(
        "--train-steps", type=positive, metavar="N", help="steps of AdamW on the same batch"
    )
    either.add_argument(
        "--generate", type=positive, metavar="N", help="generate N tokens, greedily"
    )
    work.add_argument(
        "--schedule", choices=(*SCHEDULES, AUTO),
        help=f"of sharded text (default: {SCHEDULES[0]})",
    )  # fmt: skip
    work.add_argument(
        "--text", choices=("replicated", "sharded"), default="replicated",
        help="whether every rank has the whole text (default: %(default)s)",
    )  # fmt: skip
    work.add_argument(
        "--keep-kv", action="store_true", help="keep keys and values instead of recomputing them"
    )
    work.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="gpu: one for each rank of a host; auto: gpu if every rank has one",
    )  # fmt: skip

    report = parser.add_argument_group("reports")
    report.add_argument(
        "--check", action="store_true",
        help="compare with the model on rank 0 alone; exit status 1 if they differ",
    )  # fmt: skip
    report.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write all numbers to a file, or to stdout instead of the table",
    )  # fmt: skip


def contradiction(options: argparse.Namespace) -> str | None:
    """Return an error message if arguments contradict each other."""
    if options.weights is not None and options.size is not None:
        return "argument --size: not allowed with argument --weights"
    if options.schedule is not None and options.text != "sharded":
        return "argument --schedule: needs --text sharded: text that all ranks have does not travel"
    if options.generate is not None and options.text == "sharded":
        return "argument --generate: not allowed with --text sharded"
    return None

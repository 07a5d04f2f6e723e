"""The arguments of ``run``."""

import argparse
from math import isfinite

from lvxattn.cli.arguments import natural, positive
from lvxattn.common.handshake import AUTO, SCHEDULES
from lvxattn.common.validation import FLOATING
from lvxattn.plan.models import MODELS

_MADE_UP = [
    *("model", "frames", "text_tokens", "visual_tokens", "batch", "heads", "kv_heads"),
    *("head_dim", "value_dim", "dtype", "mask"),
]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run`` to a parser."""
    sizes = parser.add_argument_group("random tensors, of a model's shapes or of given ones")
    sizes.add_argument(
        "--model", choices=sorted(MODELS), metavar="NAME", help=", ".join(sorted(MODELS))
    )
    for name, what in (
        ("--frames", "of a model's video (default: 8)"),
        ("--text-tokens", "queries, S_Q (default: 1024)"),
        ("--visual-tokens", "keys, S_KV, instead of frames (default: 16384)"),
    ):
        sizes.add_argument(name, type=natural, metavar="N", help=what)
    for name, what in (
        ("--heads", "query heads, H (default: the model's, or 8)"),
        ("--kv-heads", "key-value heads, H_KV (default: the model's, or as many as heads)"),
        ("--head-dim", "width of queries and keys, D (default: the model's, or 64)"),
        ("--value-dim", "width of values, D_V (default: D)"),
        ("--batch", "B (default: 1)"),
    ):
        sizes.add_argument(name, type=positive, metavar="N", help=what)
    sizes.add_argument("--dtype", choices=FLOATING, help="(default: float32)")
    sizes.add_argument(
        "--mask", choices=("none", "padding"), help="padding: hide the end of each video"
    )
    sizes.add_argument("--seed", type=natural, default=0, metavar="N", help="other random tensors")

    files = parser.add_argument_group("tensors in safetensors files; each rank reads its slice")
    files.add_argument(
        "--input", metavar="FILE", help="q, k, v and, if there are, mask and dout (--backward)"
    )
    files.add_argument(
        "--output", metavar="FILE", help="write out, lse and, with --backward, dq, dk, dv"
    )

    work = parser.add_argument_group("what is done")
    work.add_argument("--backward", action="store_true", help="compute gradients, too")
    work.add_argument(
        "--schedule",
        choices=(*SCHEDULES, AUTO),
        default=SCHEDULES[0],
        help="auto takes the one that sends the fewest bytes (default: %(default)s)",
    )
    work.add_argument(
        "--machine",
        metavar="NAME",
        help="auto takes the one that takes the least time on this: a preset of "
        "lvxattn.plan, or a file that Machine.save wrote",
    )
    work.add_argument("--scale", type=_finite, metavar="X", help="(default: 1 / sqrt(D))")
    work.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="gpu: each rank of a host its own; auto: gpu where every rank has one",
    )
    work.add_argument(
        "--check",
        action="store_true",
        help="compare sampled rows with a softmax in float64; exit status 1 if they differ",
    )
    work.add_argument(
        "--repeat", type=positive, metavar="N", help="measure N times after a warm-up: medians"
    )

    report = parser.add_argument_group("what is reported")
    report.add_argument("--json", metavar="FILE", help="write all numbers to a file, - for stdout")
    report.add_argument(
        "--trace",
        metavar="FILE",
        help="write what every rank did when, for ui.perfetto.dev; of the last repetition",
    )
    report.add_argument("--plot-trace", metavar="FILE.png", help="draw that; needs matplotlib")
    report.add_argument("--quiet", action="store_true", help="print errors only")


def contradiction(options: argparse.Namespace) -> str | None:
    """Say which of the arguments given do not go together, if any."""
    if options.input:
        for name in _MADE_UP:
            if getattr(options, name) is not None:
                return f"argument --{name.replace('_', '-')}: not allowed with argument --input"
    if options.frames is not None and options.model is None:
        return "argument --frames: needs a --model"
    if options.frames is not None and options.visual_tokens is not None:
        return "argument --visual-tokens: not allowed with argument --frames"
    if options.machine is not None and options.schedule != AUTO:
        return f"argument --machine: needs --schedule {AUTO}"
    return None


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return number

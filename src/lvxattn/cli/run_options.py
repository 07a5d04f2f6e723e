"""The command line of ``run``."""

import argparse
from collections.abc import Callable
from math import inf

from lvxattn.cli.arguments import AddCommand, a_grid, between, natural, positive
from lvxattn.common.handshake import AUTO, SCHEDULES
from lvxattn.common.validation import FLOATING
from lvxattn.plan.models import MODELS, PROBLEMS

_MADE_UP = [
    *("model", "frames", "text_tokens", "visual_tokens", "batch", "heads", "kv_heads"),
    *("head_dim", "value_dim", "dtype", "mask"),
]


def add_run(add: AddCommand, run: Callable[..., int], epilog: str | None = None) -> None:
    """Add ``run`` to the commands of an implementation."""
    add_options(
        add(
            "run", run, epilog=epilog,
            help="cross-attention on random tensors or on a file's",
            description="Exact distributed cross-attention: measured, checked and reported.",
        )
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run`` to a parser."""
    sizes = parser.add_argument_group("random tensors, of a model's shapes or of given ones")
    names = sorted(MODELS | PROBLEMS)
    sizes.add_argument("--model", choices=names, metavar="NAME", help=", ".join(names))
    for name, least, what in (
        ("--frames", natural, "frames of a model's video (default: 8)"),
        ("--text-tokens", natural, "queries, S_Q (default: a fixed model's, or 1024)"),
        ("--visual-tokens", natural, "keys, S_KV, not frames (default: a model's, or 16384)"),
        ("--heads", positive, "query heads, H (default: the model's, or 8)"),
        ("--kv-heads", positive, "key-value heads, H_KV (default: the model's, or H)"),
        ("--head-dim", positive, "width of queries and keys, D (default: the model's, or 64)"),
        ("--value-dim", positive, "width of values, D_V (default: D)"),
        ("--batch", positive, "batch size, B (default: 1)"),
    ):
        sizes.add_argument(name, type=least, metavar="N", help=what)
    sizes.add_argument("--dtype", choices=FLOATING, help="(default: float32)")
    sizes.add_argument(
        "--mask", choices=("none", "padding"), help="padding: hide the end of each video"
    )
    sizes.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="seed of the random tensors"
    )

    files = parser.add_argument_group("tensors in safetensors files; each rank reads its slice")
    work = parser.add_argument_group("computation")
    report = parser.add_argument_group("reports")
    for group, name, metavar, what in (
        (files, "--input", "FILE", "q, k, v and, if present, mask and dout (--backward)"),
        (files, "--output", "FILE", "write out, lse and, with --backward, dq, dk, dv"),
        (report, "--json", "FILE", "write all numbers to a file, - for stdout"),
        (report, "--trace", "FILE", "write a trace of the last repetition for ui.perfetto.dev"),
        (report, "--plot-trace", "FILE.png", "plot the trace; needs matplotlib"),
    ):
        group.add_argument(name, metavar=metavar, help=what)
    report.add_argument("--quiet", action="store_true", help="print errors only")

    work.add_argument("--backward", action="store_true", help="compute gradients, too")
    work.add_argument(
        "--schedule", choices=(*SCHEDULES, AUTO), default=SCHEDULES[0],
        help="auto: the schedule that sends the fewest bytes (default: %(default)s)",
    )  # fmt: skip
    work.add_argument(
        "--grid",
        type=a_grid,
        metavar="AxB",
        help="grid: rings of A ranks that queries go round, of B that keys do (default: the best)",
    )
    work.add_argument(
        "--machine", metavar="NAME",
        help="auto: the schedule that takes the least time on this machine, a preset of "
        "lvxattn.plan or a file written by measure",
    )  # fmt: skip
    work.add_argument(
        "--scale", type=between(-inf, inf, "a finite number"), metavar="X",
        help="(default: 1 / sqrt(D))",
    )  # fmt: skip
    work.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="gpu: one for each rank of a host; auto: gpu if every rank has one",
    )  # fmt: skip
    work.add_argument(
        "--check", action="store_true",
        help="compare sampled rows with a softmax in float64; exit status 1 if they differ",
    )  # fmt: skip
    work.add_argument(
        "--repeat", type=positive, metavar="N", help="report medians of N runs after a warm-up"
    )


def contradiction(options: argparse.Namespace) -> str | None:
    """Return an error message if arguments contradict each other."""
    if options.input:
        for name in _MADE_UP:
            if getattr(options, name) is not None:
                return f"argument --{name.replace('_', '-')}: not allowed with argument --input"
    if options.frames is not None and options.model not in MODELS:
        return f"argument --frames: needs a --model of {', '.join(MODELS)}"
    if options.frames is not None and options.visual_tokens is not None:
        return "argument --visual-tokens: not allowed with argument --frames"
    if options.machine is not None and options.schedule != AUTO:
        return f"argument --machine: needs --schedule {AUTO}"
    if options.grid is not None and options.schedule != "grid":
        return "argument --grid: needs --schedule grid"
    return None

r"""The command of the plan: tables, and a picture.

python -m lvxattn.reference.plan --model llama3v --frames 1200 --text-tokens 2048 \
        --machine a100-16 --plot plan.png
"""

import sys
from argparse import Namespace
from pathlib import Path

from lvxattn.reference.agreement import SCHEDULES
from lvxattn.reference.plan.choose import refusal
from lvxattn.reference.plan.draw import PICTURES
from lvxattn.reference.plan.machine import MACHINES, Machine, machine_of
from lvxattn.reference.plan.memory import memory, most_frames
from lvxattn.reference.plan.problem import planned
from lvxattn.reference.plan.problems import MODELS
from lvxattn.reference.plan.simulate import play
from lvxattn.reference.plan.steps import messages
from lvxattn.reference.run.arguments import Parser, UsageError, natural, positive

_WIDTHS = (12, 15, 12, 12, 12)
# All steps of all ranks are played, and they grow as P^2.
_MOST_RANKS = 512
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def main(arguments: list[str]) -> int:
    """Print what every schedule costs.

    Parameters
    ----------
    arguments : list of str
        Of the command line.

    Returns
    -------
    int
        The exit status: 0, or 2 if the arguments make no sense.
    """
    try:
        options = _parser().parse_args(arguments)
        machine = _machine(options.machine)
        P = options.ranks or machine.ranks
        if P > _MOST_RANKS:
            raise UsageError(f"--ranks: expected at most {_MOST_RANKS:,}, got {P:,}")
        text = plan(options, machine)
        if options.plot:
            _plot(options, machine)
    except UsageError as error:
        print(str(error).removesuffix(" (on all ranks)"), file=sys.stderr)
        return 2
    print(text)
    return 0


def plan(options: Namespace, machine: Machine) -> str:
    """Return the tables: what each schedule costs a layer, and what fits.

    Parameters
    ----------
    options : Namespace
        model, frames, text_tokens, ranks, dtype.
    machine : Machine

    Returns
    -------
    str
    """
    model, P = MODELS[options.model], options.ranks or machine.ranks
    q, k = model.shapes(options.text_tokens, options.frames)
    lines = [
        "LV-XAttn plan",
        f"  problem   {model.name}, {options.frames:,} frames, {options.text_tokens:,} text tokens",
        f"  shapes    q {q}   k {k}   v {k}   {options.dtype}",
        f"  machine   {machine.name}: {P} ranks, {machine.ranks_per_host} a host",
        "",
        "  one layer                         forward                                backward",
        f"  {'schedule':10}" + 2 * f"{'messages':>10}{'sent':>12}{'time':>12}     " + "over ring",
    ]
    times: dict[str, float] = {}
    rows: dict[str, str] = {}
    for schedule in SCHEDULES:
        layout = planned(q, k, P, dtype=options.dtype, schedule=schedule)
        why = refusal(layout)
        if why:
            rows[schedule] = f"  {schedule:10}  cannot be taken: {why}"
            continue
        cells, times[schedule] = f"  {schedule:10}", 0.0
        for backward in (False, True):
            sent = max(
                (messages(layout, rank, backward=backward) for rank in range(P)),
                key=lambda found: sum(message.nbytes for message in found),
            )
            seconds = play(layout, machine, backward=backward).seconds
            nbytes = sum(message.nbytes for message in sent)
            cells += f"{len(sent):>10,}{_bytes(nbytes):>12}{_seconds(seconds):>12}     "
            times[schedule] += seconds
        rows[schedule] = cells
    for schedule, row in rows.items():
        faster = f"{times['ring'] / times[schedule]:8.1f} x" if schedule in times else ""
        lines.append(row + faster)
    best = min(times, key=lambda schedule: times[schedule])
    lines += ["", f"  least time  {best}", "", *_fitting(options, machine, P)]
    return "\n".join(lines)


def _fitting(options: Namespace, machine: Machine, P: int) -> list[str]:
    """Return what all layers take of a rank, with keys and values kept and made again."""
    model = MODELS[options.model]
    lines = [
        f"  {model.cross_layers:>2} layers, a rank     features   keys, values        text"
        "      blocks       total   frames that fit"
    ]
    fits: list[int] = []
    for title, recompute in (("kept", False), ("made again", True)):
        given = {"dtype": options.dtype, "recompute": recompute}
        found = memory(model, options.text_tokens, options.frames, P, **given)
        fits.append(most_frames(model, options.text_tokens, P, machine.room, **given))
        sizes = (found.features, found.keys, found.text, found.blocks, found.total)
        cells = "".join(f"{_bytes(x):>{n}}" for x, n in zip(sizes, _WIDTHS, strict=True))
        lines.append(f"  keys, values {title:10}{cells}{fits[-1]:>18,}")
    if fits[0]:
        lines.append(
            f"  {fits[1] / fits[0]:.1f} times as many frames, if a rank keeps nothing else"
        )
    return lines


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lvxattn.reference.plan",
        description="What each schedule would cost on a cluster, and what fits.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3v")
    parser.add_argument("--frames", type=natural, default=1200, metavar="N")
    parser.add_argument("--text-tokens", type=natural, default=2048, metavar="N")
    parser.add_argument(
        "--machine", default="a100-16", metavar="NAME",
        help=f"{', '.join(MACHINES)}, or a file that Machine.save wrote",
    )  # fmt: skip
    parser.add_argument("--ranks", type=positive, metavar="P", help="the machine's unless given")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--plot", metavar="FILE", help="draw where which schedule wins")
    return parser


def _machine(text: str) -> Machine:
    try:
        return machine_of(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--machine: {error}") from None


def _plot(options: Namespace, machine: Machine) -> None:
    from lvxattn.reference.plan.draw_plan import winners  # matplotlib takes its time

    if Path(options.plot).suffix.lower() not in PICTURES:
        raise UsageError(
            f"--plot: expected a name that ends in {', '.join(PICTURES)}, got {options.plot}"
        )
    folder = Path(options.plot).resolve().parent
    if not folder.is_dir():
        raise UsageError(f"--plot: there is no folder {folder}")
    figure = winners(
        MODELS[options.model],
        machine,
        options.ranks or machine.ranks,
        options.dtype,
        options.text_tokens,
    )
    try:
        figure.savefig(options.plot, dpi=110)
    except OSError as error:
        raise UsageError(f"--plot: {options.plot}: {error.strerror}") from None


def _bytes(x: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if x >= size:
            return f"{x / size:.1f} {unit}"
    return f"{x:.0f} B"


def _seconds(x: float) -> str:
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if x >= size:
            return f"{x / size:.2f} {unit}"
    return f"{x / 1e-6:.0f} us"

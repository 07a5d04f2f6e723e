r"""The command ``plan``: tables, and a picture.

A model of frames and text has memory and a training step, too; a problem of fixed lengths has not.

python -m lvxattn.plan --model llama3v --frames 1200 --text-tokens 2048 \
        --machine a100-16 --plot plan.png
"""

import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from lvxattn.cli.arguments import Parser, UsageError, cannot_write, positive
from lvxattn.common.handshake import SCHEDULES
from lvxattn.common.validation import FLOATING
from lvxattn.draw.bars import format_bytes
from lvxattn.draw.picture import cannot_draw, save_picture
from lvxattn.plan.choose import named, refusal, unlike_ranks
from lvxattn.plan.machine import MACHINES, Machine, machine_of
from lvxattn.plan.memory import memory, most_frames
from lvxattn.plan.models import MODELS, PROBLEMS, planned
from lvxattn.plan.simulate import play
from lvxattn.plan.steps import messages
from lvxattn.plan.whole import WHOLE, most_frames_of_step, step, traffic

_PROGRAM = "python -m lvxattn.plan"
_WIDTHS = (12, 15, 12, 12, 12)
# All steps of all ranks are simulated: their number grows as P^2.
_MOST_RANKS = 512
# Of a model of frames and text.
_LENGTHS = {"frames": 1200, "text_tokens": 2048}


def main(arguments: list[str]) -> int:
    """Print the cost of every schedule.

    Parameters
    ----------
    arguments : list of str
        The command line.

    Returns
    -------
    int
        The exit status: 0, or 2 for an invalid command line.
    """
    try:
        options = _options(arguments)
        text = plan(options)
        if options.plot:
            _plot(options)
            text += f"\n\n  written   {options.plot}"
    except UsageError as error:
        print(str(error).removesuffix(" (on all ranks)"), file=sys.stderr)
        return 2
    print(text)
    return 0


def plan(options: Namespace) -> str:
    """Return the tables: the cost of a layer by schedule, and memory.

    Parameters
    ----------
    options : Namespace
        model, frames, text_tokens, machine, ranks, dtype.

    Returns
    -------
    str
    """
    fixed, machine, P = PROBLEMS.get(options.model), options.machine, options.ranks
    if fixed:
        q, k = fixed.shapes()
        problem = f"{fixed.about}, {_count(fixed.layers, 'layer')}"
    else:
        q, k = MODELS[options.model].shapes(options.text_tokens, options.frames)
        frames, tokens = _count(options.frames, "frame"), _count(options.text_tokens, "text token")
        problem = f"{frames}, {tokens}"
    measured = []
    if machine.measured is not None:
        heads = q[1], k[1], q[3]
        text = machine.measured.compared_with("the plan", heads, options.dtype)
        measured = [f"  measured  {text}"]
        copied = machine.ranks_per_host < P and machine.inside == machine.between
        if copied and machine.ranks == 1:
            measured += ["  links     not measured, by 1 rank: taken to be as fast as its memory"]
        elif copied and machine.ranks_per_host > 1:
            measured += ["  links     measured inside a host; between hosts taken as alike"]
    lines = [
        "LV-XAttn plan",
        f"  problem   {options.model}, {problem}",
        f"  shapes    q {q}   k {k}   v {k}   {options.dtype}",
        f"  machine   {machine.name}: {_count(P, 'rank')}, {min(P, machine.ranks_per_host)} a host",
        *measured,
        "",
        "  one layer                         forward                                backward",
        f"  {'schedule':10}" + 2 * f"{'messages':>10}{'sent':>12}{'time':>12}     " + "over ring",
    ]
    times: dict[str, float] = {}
    names: dict[str, str] = {}
    rows: dict[str, str] = {}
    for schedule in SCHEDULES:
        layout = planned(q, k, P, dtype=options.dtype, schedule=schedule, machine=machine)
        why = refusal(layout)
        if why:
            rows[schedule] = f"  {schedule:10}  cannot be taken: {why}"
            continue
        names[schedule], times[schedule] = named(schedule, layout.grid), 0.0
        cells = f"  {names[schedule]:10}"
        for backward in (False, True):
            sent = max(
                (messages(layout, rank, backward=backward) for rank in unlike_ranks(layout)),
                key=lambda found: sum(message.nbytes for message in found),
            )
            seconds = play(layout, machine, backward=backward).seconds
            nbytes = sum(message.nbytes for message in sent)
            cells += f"{len(sent):>10,}{_size(nbytes):>12}{_seconds(seconds):>12}     "
            times[schedule] += seconds
        rows[schedule] = cells
    for schedule, row in rows.items():
        faster = f"{times['ring'] / times[schedule]:8.1f} x" if schedule in times else ""
        lines.append(row + faster)
    best = names[min(times, key=times.__getitem__)] if P > 1 else "any: nothing is sent"
    lines += ["", f"  least time  {best}"]
    if not fixed:
        lines += ["", *_fitting(options), "", *_whole(options, times)]
    return "\n".join(lines)


def _fitting(options: Namespace) -> list[str]:
    """Return the lines on a rank's memory, with keys and values kept and recomputed."""
    model, machine, P = MODELS[options.model], options.machine, options.ranks
    lines = [
        f"  {model.cross_layers:>2} layers, a rank     features   keys, values        text"
        "      blocks       total   frames that fit"
    ]
    fits: list[int] = []
    for title, recompute in (("kept", False), ("recomputed", True)):
        given = {"dtype": options.dtype, "recompute": recompute}
        found = memory(model, options.text_tokens, options.frames, P, **given)
        fits.append(most_frames(model, options.text_tokens, P, machine.room, **given))
        sizes = (found.features, found.keys, found.text, found.blocks, found.total)
        cells = "".join(f"{_size(x):>{n}}" for x, n in zip(sizes, _WIDTHS, strict=True))
        lines.append(f"  keys, values {title:10}{cells}{fits[-1]:>18,}")
    if fits[0]:
        lines.append(
            f"  {fits[1] / fits[0]:.1f} times as many frames, if a rank keeps nothing else"
        )
    room, frames = _size(machine.room), _count(options.frames, "frame")
    if options.frames <= fits[0]:
        return [*lines, f"  a rank has {room}: room for {frames} either way"]
    if options.frames <= fits[1]:
        return [*lines, f"  a rank has {room}: room for {frames} only if they are recomputed"]
    return [*lines, f"  a rank has {room}: NO ROOM for {frames} either way"]


def _whole(options: Namespace, passes: dict[str, float]) -> list[str]:
    """Return the lines on a training step of the whole model, given the seconds of a layer's."""
    whole, machine, P = WHOLE[options.model], options.machine, options.ranks
    titles = "".join(f"{title:>12}" for title in ("tower", "text", "cross-att.", "total"))
    lines = [f"  a step of the whole model{titles}   over ring"]
    steps = {
        schedule: step(
            whole, machine, options.text_tokens, options.frames, P,
            dtype=options.dtype, schedule=schedule, passes=seconds,
        )
        for schedule, seconds in passes.items()
    }  # fmt: skip
    for schedule, found in steps.items():
        times = found.tower, found.text, found.cross, found.total
        cells = "".join(f"{_seconds(x):>12}" for x in times)
        faster = steps["ring"].total / found.total
        lines.append(f"  {schedule:25}{cells}{faster:>10.1f} x")
    fits = [
        most_frames_of_step(
            whole, options.text_tokens, P, machine.room, dtype=options.dtype, recompute=recompute
        )
        for recompute in (False, True)
    ]
    weights = f"{whole.parameters / 1e9:.1f} billion weights"
    sent = _size(traffic(whole, P, options.dtype))
    return [
        *lines,
        f"  {weights}, sharded over the ranks (FSDP): {sent} sent by a rank, not timed",
        f"  frames that fit, weights and AdamW too: {fits[0]:,} with keys and values kept, "
        f"{fits[1]:,} recomputed",
        "  assumed: every layer checkpointed, the text sharded, the tower trained frame by frame",
    ]


def _options(arguments: list[str]) -> Namespace:
    """Parse the arguments; ranks and dtype default to the machine's."""
    parser = Parser(
        prog=_PROGRAM,
        description="Print the time, messages and memory of each schedule on a cluster.",
        allow_abbrev=False,
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "--model", choices=sorted(MODELS | PROBLEMS), default="llama3v", metavar="NAME",
        help=f"of frames and text: {', '.join(MODELS)}; of fixed lengths: {', '.join(PROBLEMS)} "
        + default,
    )  # fmt: skip
    for name, count in _LENGTHS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=positive, metavar="N", help=f"(default: {count})"
        )
    parser.add_argument(
        "--machine", type=_machine, default="a100-16", metavar="NAME",
        help=f"{', '.join(MACHINES)}, or a file written by measure (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=positive, metavar="P", help="default: the ranks of the machine"
    )
    parser.add_argument(
        "--dtype", choices=FLOATING,
        help="default: the dtype measured on the machine; bfloat16 for presets",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="plot the fastest schedule, and memory")
    options = parser.parse_args(arguments)
    measured = options.machine.measured
    options.ranks = options.ranks or options.machine.ranks
    options.dtype = options.dtype or (measured.dtype if measured else "bfloat16")
    if options.ranks > _MOST_RANKS:
        parser.error(f"argument --ranks: expected at most {_MOST_RANKS:,}, got {options.ranks:,}")
    for name, count in _LENGTHS.items():
        if options.model in MODELS and getattr(options, name) is None:
            setattr(options, name, count)
    if options.model in PROBLEMS:
        for name in (*_LENGTHS, "plot"):
            if getattr(options, name) is not None:
                parser.error(
                    f"argument --{name.replace('_', '-')}: not allowed with --model "
                    f"{options.model}, whose lengths are fixed"
                )
    if options.plot:
        problem = cannot_draw(Path(options.plot)) or cannot_write(options.plot)
        if problem:
            parser.error(f"argument --plot: {problem}")
    return options


def _machine(text: str) -> Machine:
    try:
        return machine_of(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _plot(options: Namespace) -> None:
    from lvxattn.draw.plan import winners  # imports matplotlib

    model, machine = MODELS[options.model], options.machine
    figure = winners(model, machine, options.ranks, options.dtype, options.text_tokens)
    try:
        save_picture(figure, options.plot)
    except OSError as error:
        problem = f"{options.plot} cannot be written: {error.strerror}"
        raise UsageError(f"{_PROGRAM}: error: argument --plot: {problem}") from None


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _size(x: float) -> str:
    return format_bytes(x, ".1f")


def _seconds(x: float) -> str:
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if x >= size:
            return f"{x / size:.2f} {unit}"
    return f"{x / 1e-6:.0f} us"

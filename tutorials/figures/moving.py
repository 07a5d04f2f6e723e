"""The figures of notebook 2, why queries move."""

from figures import COLOURS, INK

from lvxattn.draw.rotation import sheet

TICKS = [1, 10, 100, 1000]


def bytes_over_frames(frames, sent):
    """Draw the megabytes that a rank sends over the length of the video, by model and schedule."""
    figure, axes = sheet(3.4)
    for (name, schedule), megabytes in sent.items():
        style = "-" if name == "llama3v" else "--"
        axes.loglog(frames, megabytes, style, color=COLOURS[schedule == "ring"], lw=2)
        axes.text(frames[-1], megabytes[-1], f"  {schedule}, {name}", va="center", color=INK,
                  size=10)  # fmt: skip
    axes.set(xlabel="frames", ylabel="megabytes sent by a rank", xlim=(1, 4096))
    axes.set_xticks(TICKS, [f"{n:,}" for n in TICKS])
    axes.set_yticks([1, 100, 10_000], ["1", "100", "10,000"])
    return figure


def speed_up(frames, lines):
    """Draw how many times as fast as ring lv-xattn is over the length of the video."""
    figure, axes = sheet(3.4)
    for (name, times), colour in zip(lines.items(), (INK, *COLOURS), strict=False):
        axes.loglog(frames, times, "-" if name.startswith("on ") else "--", color=colour, lw=2)
        axes.text(frames[-1], times[-1], f"  {name}", va="center", color=colour, size=10)
    axes.axhline(1, color=INK, lw=0.8)
    axes.set(xlabel="frames", ylabel="times as fast as ring", xlim=(1, 4096))
    axes.set_xticks(TICKS, [f"{n:,}" for n in TICKS])
    axes.set_yticks(TICKS, [f"{n:,}" for n in TICKS])
    return figure


def computed_and_measured(ratios):
    """Draw pairs of bars, computed and measured, a row for each ratio."""
    figure, axes = sheet(0.7 * len(ratios) + 0.7)
    for n, (name, (computed, measured)) in enumerate(ratios.items()):
        for place, value, colour in ((n - 0.17, computed, COLOURS[0]), (n + 0.17, measured, INK)):
            axes.barh(place, value, 0.3, color=colour, log=True)
            axes.text(value, place, f" {value:,.1f}", va="center", color=colour, size=11)
        axes.text(-0.01, n, name, ha="right", va="center", size=11, color=INK,
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(ylim=(len(ratios) - 0.5, -0.5), xlim=(1, 700), yticks=[], xlabel="ring over lv-xattn")
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.legend(["computed", "measured"], frameon=False, loc="lower right")
    return figure

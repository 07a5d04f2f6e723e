"""Training steps of whole models: LV-XAttn against Ring Attention, Ulysses, and no messages.

    python benchmarks/models.py [--quick] [--only PART ...] [--store DIR] [--plot FILE]

The paper's three models, scaled down, of random weights, visual features given, on 4 hosts with one
thread each; a step is a forward and a backward, and the average of gradients is timed apart.
Parts:

    links    Llama 3-V with the shortest text at several link rates
    texts    texts of several lengths at 100 Mbit/s
    memory   the peak of one process with keys and values recomputed, and kept

Prints a table in Markdown; `--store` writes it, and every single measurement as JSON, to DIR;
`--plot` draws the gain.  Exit status 2 where no cluster can be built (`netlab/lab.py`).
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import (
    Results,
    describe_run,
    exit_without_lab,
    mpirun,
    parser_for,
    printed_by,
    publish,
)
from netlab.lab import Lab, bits_per_second
from network_report import SMALL, Goal, rate, ratio, typical

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = [sys.executable, str(Path(__file__).with_name("model_passes.py"))]
P = 4
# Visual features, S_KV, and a name for people.
FEATURES = {"llama3v": 65536, "owl3": 88 * 729, "openflamingo": 8192}
NAMES = {"llama3v": "Llama 3-V", "owl3": "mPLUG-Owl3", "openflamingo": "OpenFlamingo"}
# Of these Ulysses needs heads that P divides.
ULYSSES = ("openflamingo",)
RATES, TEXTS, TEXTS_AT = ("50mbit", "100mbit", "200mbit", "1gbit"), (64, 256, 1024), "100mbit"
#: The goals: times faster than Ring Attention, time over none, frames and time of recomputation.
FASTER = {"llama3v": 10.6, "owl3": 5.6, "openflamingo": 5.6}
OVERHEAD, FRAMES, MORE_TIME = 0.05, 1.6, 0.08
# As many features as are kept, times these, are tried with keys and values recomputed.
TIMES = (1, 1.6, 2, 2.5, 3)


def links(quick: bool) -> list[Results]:
    """Measure Llama 3-V with the shortest text at every rate but that of `texts`."""
    return [
        result
        for link in (("1gbit",) if quick else RATES)
        if link != TEXTS_AT
        for result in on_hosts(link, [work("llama3v", TEXTS[0], quick=quick)])
    ]


def texts(quick: bool) -> list[Results]:
    """Measure all models with texts of several lengths at 100 Mbit/s."""
    return [
        result
        for model in FEATURES
        for result in on_hosts(
            TEXTS_AT, [work(model, S_Q, quick=quick) for S_Q in TEXTS[: 1 if quick else None]]
        )
    ]


def memory(quick: bool) -> list[Results]:
    """Measure one process with 8 layers that cross, as many as Llama 3-V has."""
    features, options = 4096 if quick else 65536, {"cross": 8, "layers": 16}
    common = {"model": "llama3v", "text_tokens": 64, "options": options}
    sizes = [("kept", features), *(("lv-xattn", round(n * features)) for n in TIMES)]
    found = []
    for kind, size in sizes:  # processes of their own: a peak does not come down
        found += alone([{**common, "kinds": [kind], "features": size, "rounds": 1}])
    kinds, rounds = ["kept", "lv-xattn"], 2 if quick else 7
    return found + alone([{**common, "kinds": kinds, "features": features, "rounds": rounds}])


PARTS = {"links": links, "texts": texts, "memory": memory}


def work(model: str, text_tokens: int, *, quick: bool) -> Results:
    """Return the arguments of one `Work`."""
    kinds = ["none", "lv-xattn", "none replicated", "replicated", "ring"]
    kinds += ["ulysses"] * (model in ULYSSES)
    features = FEATURES[model] // (11 if quick else 1)
    return {
        "model": model, "kinds": kinds, "text_tokens": text_tokens, "features": features,
        "rounds": 1 if quick else 7 if text_tokens == TEXTS[0] else 3, "seconds": 60,
    }  # fmt: skip


def on_hosts(link: str, works: list[Results]) -> list[Results]:
    """Return the works' results from a cluster of shaped links."""
    with tempfile.TemporaryDirectory() as folder, Lab(P, link, shared=[folder]) as lab:
        command = [*PROGRAM, f"{folder}/store", json.dumps(works)]
        done = lab.mpiexec(command, timeout=1200, env={"GLOO_SOCKET_IFNAME": "e0"})
    return read(done, {"hosts": P, "bits_per_second": bits_per_second(link)})


def alone(works: list[Results]) -> list[Results]:
    """Return the works' results from one process."""
    with tempfile.TemporaryDirectory() as folder:
        done = mpirun(1, [*PROGRAM, f"{folder}/store", json.dumps(works)])
    return read(done, {"hosts": 1, "bits_per_second": None})


def read(done: Any, where: Results) -> list[Results]:
    """Return the results that `model_passes.py` printed, with the link."""
    printed = json.loads(printed_by(done))
    print(".", end="", file=sys.stderr, flush=True)
    return [{**where, "torch": printed["torch"], **result} for result in printed["results"]]


def seconds(r: Results, kind: str) -> float:
    """Return the median time of a kind's steps."""
    return typical(r, kind, "seconds")


def markdown(measured: Results) -> str:
    """Return the whole report."""
    machine = measured["machine"]
    parts = [name for name in PARTS if name in measured]
    lines = [
        "# Training steps of whole models",
        "",
        f"Measured {measured['date']} on {machine['processor']}, {machine['cores']} cores, Python "
        f"{machine['python']}, PyTorch {measured[parts[0]][0]['torch']}; {P} hosts, one thread "
        "each, B = 1, fp32, visual features given. Made by `make bench`; `models.json` has every "
        "turn.",
        "",
        *([SMALL, ""] if measured["quick"] else []),
    ]
    goals: list[Goal] = []
    timed = [r for name in ("links", "texts") for r in measured.get(name, [])]
    if timed:
        lines += table(timed)
        goals += goals_of(timed)
    if "memory" in measured:
        said, more = memory_report(measured["memory"])
        lines, goals = lines + said, goals + more
    return "\n".join([*lines, *(g.line(judged=not measured["quick"]) for g in goals), ""])


def table(timed: list[Results]) -> list[str]:
    """Return the table of steps."""
    lines = [
        "Seconds of a step (forward and backward): sharded and replicated, LV-XAttn with either "
        "text, and how much longer than without messages; ring and Ulysses, with sharded text. MB: "
        "sent by a rank, sharded; sum: the average of gradients, for each of them.",
        "",
        "| model | link | S_Q | S_KV | sharded | over none | replicated | over none | ring "
        "| Ulysses | ring / sharded | ring / replicated | with the sum | MB | MB, ring | sum |",
        "|---" * 16 + "|",
    ]
    for r in timed:
        lv, copied, ring = (seconds(r, kind) for kind in ("lv-xattn", "replicated", "ring"))
        summed = r["summed"]
        ulysses = f"{seconds(r, 'ulysses'):.2f}" if "ulysses" in r["turns"] else "-"
        sent, sent_ring = (max(r["turns"][k][0]["bytes"]) / 1e6 for k in ("lv-xattn", "ring"))
        lines.append(
            f"| {NAMES[r['model']]} | {rate(r)} | {r['text_tokens']:,} | {r['features']:,} "
            f"| {lv:.2f} | {over(r, 'sharded'):+.0%} | {copied:.2f} | {over(r, 'replicated'):+.0%} "
            f"| {ring:.2f} | {ulysses} | {ring / lv:.1f} | {ring / copied:.1f} "
            f"| {(ring + summed) / (lv + summed):.1f} | {sent:.1f} | {sent_ring:.1f} "
            f"| {summed:.2f} |"
        )
    return [*lines, ""]


def over(r: Results, text: str) -> float:
    """Return the share of time that messages cost LV-XAttn."""
    kinds = {"sharded": ("lv-xattn", "none"), "replicated": ("replicated", "none replicated")}
    return ratio(r, *kinds[text], "seconds") - 1


def goals_of(timed: list[Results]) -> list[Goal]:
    """Return the goals of steps, each where a model does best."""
    goals = []
    for model, wanted in FASTER.items():
        mine = [r for r in timed if r["model"] == model]
        faster, where = max(
            (seconds(r, "ring") / seconds(r, "lv-xattn"), f"{rate(r)}, S_Q = {r['text_tokens']}")
            for r in mine
        )
        what = f"{NAMES[model]}: Ring Attention / LV-XAttn at least {wanted} ({where})"
        goals.append(Goal(what, faster, faster >= wanted))
    for text in ("replicated", "sharded"):
        cost = median(over(r, text) for r in timed if r["text_tokens"] == TEXTS[0])
        what = f"over none at most {OVERHEAD:.0%}, {text}, S_Q = {TEXTS[0]}, median of all links"
        goals.append(Goal(what, cost, cost <= OVERHEAD, "+.1%"))
    return goals


def memory_report(results: list[Results]) -> tuple[list[str], list[Goal]]:
    """Return the part on memory."""
    kept, *again, both = results
    options, room = both["options"], kept["peak"][0]
    fit = max([0.0, *(r["features"] / kept["features"] for r in again if r["peak"][0] <= room)])
    more = ratio(both, "lv-xattn", "kept", "seconds") - 1
    lines = [
        f"Memory: Llama 3-V of {options['layers']} layers, {options['cross']} of which cross, one "
        "process, peak of resident memory:",
        "",
        "| keys and values | features | peak |",
        "|---|---|---|",
        *(
            f"| {'kept' if r is kept else 'recomputed'} | {r['features']:,} "
            f"| {r['peak'][0] / 2**20:,.0f} MiB |"
            for r in (kept, *again)
        ),
        "",
    ]
    return lines, [
        Goal(f"recomputed over kept: features that fit in the same memory, at least {FRAMES}; of "
             f"{', '.join(map(str, TIMES))} times as many", fit, fit >= FRAMES),
        Goal(f"for at most {MORE_TIME:.0%} more time", more, more <= MORE_TIME, "+.1%"),
    ]  # fmt: skip


def draw(measured: Results) -> "Figure":
    """Draw the gain over link rates and text lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    every = measured["links"] + measured["texts"]
    shortest = [r for r in every if r["text_tokens"] == TEXTS[0] and r["model"] == "llama3v"]
    for axis, x_of, results, label in (
        (axes[0], lambda r: r["bits_per_second"] / 1e6, shortest, "link, Mbit/s"),
        (axes[1], lambda r: r["text_tokens"], measured["texts"], "text tokens"),
    ):
        for model, name in NAMES.items():
            points = sorted(
                (x_of(r), seconds(r, "ring") / seconds(r, "lv-xattn"))
                for r in results
                if r["model"] == model
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.axhline(1, color="grey", lw=1, ls=":")
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks(sorted({x_of(r) for r in results}), minor=False)
        axis.set_yticks([1, 2, 5, 10, 20])
        axis.minorticks_off()
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("Ring Attention / LV-XAttn")
    axes[0].set_title(f"{TEXTS[0]} text tokens", size=10)
    axes[1].set_title("100 Mbit/s", size=10)
    axes[1].legend(frameon=False)
    figure.suptitle("Time of a training step of a whole model, 4 hosts")
    return figure


def main() -> None:
    """Measure, print, store, draw."""
    parser = parser_for(__doc__, "small batches, a minute", "store", "plot")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options = parser.parse_args()
    measured = describe_run(options.quick)
    with exit_without_lab("models"):
        for part in options.only:
            measured[part] = PARTS[part](options.quick)
    print(file=sys.stderr)
    publish("models", measured, markdown(measured), options, draw)


if __name__ == "__main__":
    main()

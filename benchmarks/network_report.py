"""The report of `network.py` in Markdown.

Ratios are taken within a round, in which all kinds have a turn; the report shows the median over
rounds.  At 50 Mbit/s the one with Ring Attention is a ratio of medians.
"""

from collections import Counter
from statistics import median
from typing import Any, NamedTuple

Results = dict[str, Any]

#: The goals, at the sizes of the full version.
FASTER_FORWARD, FASTER_TOTAL = 60, 45
OVERHEAD_SLOW, OVERHEAD_SWEEP, COMPUTING_OVER_WIRE = 0.05, 0.03, 1.5
COUNTED, SPEEDUP = 0.03, 1.9
SMALL = (
    "This is the small version: it shows that everything runs. The goals are those of the full one "
    "on a quiet machine; of these only what is counted, not timed, is judged here."
)


class Goal(NamedTuple):
    """A goal, and the value reached."""

    what: str
    got: Any
    met: bool
    form: str = ".1f"

    def line(self, *, judged: bool = True) -> str:
        """Return one line: whether it was met, and the value."""
        verdict = ("met" if self.met else "**missed**") if judged else "not judged"
        return f"- {verdict}: {self.what}: {self.got:{self.form}}"


def markdown(measured: Results) -> str:
    """Return the whole report."""
    machine = measured["machine"]
    parts = {"slow": slow, "sweep": sweep, "bytes": bytes_sent, "cores": cores}
    here = [name for name in parts if name in measured]
    lines = [
        "# LV-XAttn on a network",
        "",
        f"Measured {measured['date']} on {machine['processor']}, {machine['cores']} cores, Python "
        f"{machine['python']}, NumPy {machine['numpy']}, {machine['blas']}, "
        f"{measured[here[0]][0]['mpi']}; one BLAS thread a rank, B = 1, D = 64, fp32. Something "
        f"else kept {others(measured, here):.2f} cores busy meanwhile (median over turns). Made by "
        "`make bench`; `network.json` has every turn.",
        "",
    ]
    if measured["quick"]:
        lines += [SMALL, ""]
    for name in here:
        said, goals = parts[name](measured[name])
        judged = name == "bytes" or not measured["quick"]
        lines += [*said, "", *(goal.line(judged=judged) for goal in goals), ""]
    return "\n".join(lines)


def slow(results: list[Results]) -> tuple[list[str], list[Goal]]:
    """Render 4 hosts at 50 Mbit/s."""
    (r,) = results
    alone, *_ = kinds = r["kinds"]
    name_of = {"none": "no communication", "blocks": "the same blocks alone"}[alone]
    lines = [
        f"## {r['P']} hosts at {rate(r)}, {problem(r)}",
        "",
        f"| | {name_of} | LV-XAttn | over {alone} | Ring Attention | Ring / LV-XAttn |",
        "|---|---|---|---|---|---|",
    ]
    goals = []
    for name, key, wanted in [
        ("forward", "forward", FASTER_FORWARD),
        ("forward + backward", "total", FASTER_TOTAL),
    ]:
        over = ratio(r, "lv-xattn", alone, key) - 1
        # Ring Attention takes so long that it has few turns: a ratio of medians.
        faster = typical(r, "ring", key) / typical(r, "lv-xattn", key)
        times = [f"{typical(r, kind, key):.3f} s" for kind in kinds]
        lines.append(
            f"| {name} | {times[0]} | {times[1]} | {over:+.1%} | {times[2]} | {faster:.1f} |"
        )
        goals.append(Goal(f"{name}: Ring / LV-XAttn at least {wanted}", faster, faster >= wanted))
        limit = f"{name}: at most {OVERHEAD_SLOW:.0%} over {alone}"
        goals.append(Goal(limit, over, over <= OVERHEAD_SLOW, "+.1%"))
    busy = {kind: sum(sum(turn["cpu"]) for turn in r["turns"][kind]) for kind in r["turns"]}
    more = busy["lv-xattn"] / busy[alone]
    note = (
        f"The ranks keep cores busy {more - 1:+.1%} longer than without communication, forward + "
        f"backward; the rank that waits longest for blocks waits {waits(r):.3f} s."
    )
    return [*lines, "", note], goals


def sweep(results: list[Results]) -> tuple[list[str], list[Goal]]:
    """Render 1 Gbit/s and shared memory."""
    lines = [
        "## Forward at 1 Gbit/s and in shared memory",
        "",
        "Wire: what leaves a host over the rate; in shared memory, what a rank sends over the rate "
        "of messages alone. Computing, and none: the pass without communication.",
        "",
        "| link | P | heads | S_Q | S_KV | none | computing / wire | over none | Ring / LV-XAttn | "
        "faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    judged = []
    for r in results:
        over, faster = ratio(r, "lv-xattn", "none") - 1, ratio(r, "ring", "lv-xattn")
        none = typical(r, "none")
        hidden = none / wire_seconds(r)
        if hidden >= COMPUTING_OVER_WIRE:
            judged.append(over)
        mark = "" if hidden < COMPUTING_OVER_WIRE or over <= OVERHEAD_SWEEP else " !"
        winner = "Ring Attention" if faster < 0.98 else "LV-XAttn" if faster > 1.02 else "equal"
        lines.append(
            f"| {rate(r)} | {r['P']} | {r['H']}/{r['H_KV']} | {r['S_Q']:,} | {r['S_KV']:,} "
            f"| {none * 1e3:.1f} ms | {hidden:.1f} | {over:+.1%}{mark} | {faster:.2f} | {winner} |"
        )
    met = sum(over <= OVERHEAD_SWEEP for over in judged)
    what = (
        f"at most {OVERHEAD_SWEEP:.0%} over none where computing takes {COMPUTING_OVER_WIRE} times "
        f"the wire time or more: {met} of {len(judged)} rows, worst"
    )
    return lines, [Goal(what, max(judged, default=0.0), met == len(judged), "+.1%")]


def bytes_sent(results: list[Results]) -> tuple[list[str], list[Goal]]:
    """Render what left each host."""
    lines = [
        "## Bytes that left each host",
        "",
        "2 hosts of 2 ranks, forward + backward.",
        "",
        "| schedule | placement | host | counted | on the link | difference |",
        "|---|---|---|---|---|---|",
    ]
    worst = 0.0
    counts: dict[str, list[list[int]]] = {}
    for r in results:
        for kind, turns in r["turns"].items():
            counted, link = by_host(turns[-1])
            counts.setdefault(kind, []).append(list(counted.values()))
            for host, expected in counted.items():
                off = link[host] / expected - 1
                worst = max(worst, abs(off))
                lines.append(
                    f"| {kind} | {r['placement']} | {host} | {expected:,} | {link[host]:,} "
                    f"| {off:+.1%} |"
                )
    same = all(block == cyclic for block, cyclic in counts.values())
    return lines, [
        Goal(f"counters within {COUNTED:.0%} of what was counted, worst", worst, worst <= COUNTED,
             ".1%"),
        Goal("placement in blocks and cyclic send the same", "yes" if same else "no", same, ""),
    ]  # fmt: skip


def cores(results: list[Results]) -> tuple[list[str], list[Goal]]:
    """Render two ranks against one."""
    (r,) = results
    lines = [
        f"## Two ranks against one, {problem(r)}",
        "",
        "Ceiling: what two ranks reach that do the whole problem each, at once, and never speak.",
        "",
        "| | one rank | two ranks | speedup | ceiling |",
        "|---|---|---|---|---|",
    ]
    goals = []
    for name, key in [("forward", "forward"), ("forward + backward", "total")]:
        speedup = ratio(r, "one", "lv-xattn", key)
        ceiling = 2 * ratio(r, "one", "each", key)
        one, two = typical(r, "one", key), typical(r, "lv-xattn", key)
        lines.append(f"| {name} | {one:.3f} s | {two:.3f} s | {speedup:.2f} | {ceiling:.2f} |")
        wanted = f"{name}: speedup at least {SPEEDUP}"
        goals.append(Goal(wanted, speedup, speedup >= SPEEDUP, ".2f"))
    return lines, goals


def problem(r: Results) -> str:
    """Return the sizes."""
    return f"S_Q = {r['S_Q']:,}, S_KV = {r['S_KV']:,}, heads {r['H']}/{r['H_KV']}"


def rate(r: Results) -> str:
    """Return the link's rate as text, or ``"shared memory"``."""
    bits = r["bits_per_second"]
    if bits is None:
        return "shared memory"
    return f"{bits / 1e9:g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:g} Mbit/s"


def typical(r: Results, kind: str, key: str = "forward") -> float:
    """Return the median over rounds."""
    return median(turn[key] for turn in r["turns"][kind])


def ratio(r: Results, above: str, below: str, key: str = "forward") -> float:
    """Return the median ratio over the rounds in which both kinds had a turn."""
    below_by_round = {turn["round"]: turn[key] for turn in r["turns"][below]}
    return median(
        turn[key] / below_by_round[turn["round"]]
        for turn in r["turns"][above]
        if turn["round"] in below_by_round
    )


def others(measured: Results, parts: list[str]) -> float:
    """Return the number of cores that other processes kept busy."""
    results = (result for part in parts for result in measured[part])
    return median(t["others"] for r in results for turns in r["turns"].values() for t in turns)


def waits(r: Results) -> float:
    """Return the waiting time of the rank of LV-XAttn that waits longest."""
    return median(max(turn["waiting"]) for turn in r["turns"]["lv-xattn"])


def wire_seconds(r: Results) -> float:
    """Return the time that LV-XAttn's bytes take on the busiest link at its rate."""
    turn = r["turns"]["lv-xattn"][-1]
    if r["bits_per_second"] is None:
        return max(turn["bytes"]) / r["messages_alone"]
    return 8 * max(by_host(turn)[0].values()) / r["bits_per_second"]


def by_host(turn: Results) -> tuple[Counter[str], Counter[str]]:
    """Return the bytes that leave each host, by the ranks' count and by the link's counter."""
    counted: Counter[str] = Counter()
    for host, left in zip(turn["host"], turn["left_host"], strict=True):
        counted[host] += left
    return counted, Counter(dict(zip(turn["host"], turn["link"], strict=True)))

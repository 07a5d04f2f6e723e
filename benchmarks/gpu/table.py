"""The Markdown page of a GPU run, from its stored results."""

from typing import Any

from judge import Row, limit, speedup, unsplit, verdicts


def page(stored: Row) -> str:
    """Return the page."""
    lines = [f"# {stored['device']}", ""]
    if stored["rehearsal"]:
        lines += ["A rehearsal on a CPU with tiny shapes: the numbers mean nothing.", ""]
    lines += [f"- {need}: {said}" for need, said in stored["found"].items()]
    lines += [f"- {need}: missing ({why})" for need, why in stored["missing"].items()]
    parts = stored["parts"]
    ceilings: Row = (parts.get("ceilings") or [{}])[0]
    if ceilings:
        rates = ", ".join(
            f"{ceilings[name] / 1e12:.3g} {unit}"
            for name, unit in (
                ("bfloat16", "TFLOP/s in bf16"), ("float16", "in fp16"), ("copy", "TB/s copied"),
            )
        )  # fmt: skip
        lines += ["", f"The device's own rates, measured here: {rates} (read and written)."]
    sections = (
        ("What was run", [steps(stored["steps"])]),
        ("Goals", [goals(verdicts(stored))]),
        ("torch_impl's block attention", local(parts.get("local", []), ceilings)),
        ("mpi_impl's block attention on CuPy", local(parts.get("cupy", []), ceilings)),
        ("A rank that is alone", [overhead(parts.get("overhead", []))]),
        ("Errors in half precision, over the rounding of the truth", [errors(parts.get("errors"))]),
        ("A million keys on one device", [million(parts.get("million", []))]),
        ("The merge", [merging(parts.get("merging", []), ceilings)]),
    )
    for title, tables in sections:
        lines += ["", f"## {title}", ""]
        for text in tables:
            lines += [text or "Not measured.", ""]
        lines.pop()
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table, or nothing."""
    if not rows:
        return ""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in cells
    )


def steps(rows: list[Row]) -> str:
    """Return the outcomes of all steps."""
    return table(
        ["step", "outcome", "seconds", "last line"],
        [[row["name"], row["outcome"], row["seconds"], row["last"]] for row in rows],
    )


def goals(rows: list[Row]) -> str:
    """Return the goals and their verdicts."""
    return table(
        ["goal", "wanted", "worst", "where", "met in", "verdict"],
        [
            [row["what"], row["wanted"], "" if row["worst"] is None else f"{row['worst']:.3g}",
             row["where"], row["met"], row["verdict"]]
            for row in rows
        ],
    )  # fmt: skip


def local(rows: list[Row], ceilings: Row) -> list[str]:
    """Return times compared with PyTorch's, and those of every kernel."""
    if not rows:
        return [""]
    short, full, judged = [], [], any("off by" in row for row in rows)
    for row in rows:
        ours = row["seconds"].get("auto")
        sdpa = row["sdpa seconds"]
        shape = [row["pass"], row["dtype"], row["s_q"], row["s_kv"]]
        ways = {**row["seconds"], **sdpa}
        full.append([*shape, "; ".join(f"{n} {1e3 * s:.3g}" for n, s in _ordered(ways))])
        best = min(sdpa, key=sdpa.__getitem__, default="")
        rate, copy = ceilings.get(row["dtype"]), ceilings.get("copy")
        short.append(
            [
                *shape, row["auto"], f"{1e3 * ours:.3g}" if ours else "FAILED",
                f"{row['flop'] / ours / rate:.2f}" if ours and rate else "",
                f"{row['bytes'] / ours / copy:.2f}" if ours and copy else "",
                f"{best} {1e3 * sdpa[best]:.3g}" if best else "",
                f"{speedup(row, sdpa):.2f}" if ours and best else "",
                f"{speedup(row, unsplit(row)):.2f}" if ours and unsplit(row) else "",
                *([_off_by(row)] if judged else []),
            ]
        )  # fmt: skip
    head = ["pass", "dtype", "s_q", "s_kv"]
    columns = ["kernel", "ms", "of matmul rate", "of copy rate", "SDPA's best, ms", "SDPA / ours"]
    found = [
        table([*head, *columns, "unsplit / ours", *(["off by"] if judged else [])], short),
        table([*head, "ms by kernel"], full),
    ]
    failed = sorted({f"- {name}: {why}" for row in rows for name, why in row["failed"].items()})
    return [*found, "\n".join(["What could not be done:", "", *failed])] if failed else found


def _off_by(row: Row) -> str:
    """Return a result's error, and whether it is wrong."""
    if "off by" not in row:
        return ""
    return f"{row['off by']:.1e}" + ("" if row["off by"] <= limit(row) else ", WRONG")


def overhead(rows: list[Row]) -> str:
    """Return the overhead."""
    lines = []
    for row in rows:
        for name in ("forward", "backward"):
            got = row[name]
            lines.append([
                name, row["s_q"], row["s_kv"], f"{1e3 * got['seconds']:.4g}",
                f"{1e3 * got['block seconds']:.4g}", f"{got['ratio']:.4f}", row["goal"],
            ])  # fmt: skip
    head = ["pass", "s_q", "s_kv", "cross_attention, ms", "its block, ms", "ratio", "goal"]
    return table(head, lines)


def errors(rows: list[Row] | None) -> str:
    """Return errors over the number of shards."""
    names = ("out", "dq", "dk", "dv")
    lines = []
    for row in rows or []:
        ratios = [f"{row['over the floor'][name]:.2f}" for name in names]
        lines.append([row["dtype"], row["shards"], *ratios, row["goal"]])
    return table(["dtype", "shards", *names, "goal: below"], lines)


def million(rows: list[Row]) -> str:
    """Return memory."""
    lines = []
    for row in rows:
        for name in ("forward", "forward and backward"):
            got = row[name]
            lines.append([
                name, row["s_q"], row["s_kv"], f"{1e3 * got['seconds']:.4g}",
                f"{got['inputs and outputs'] / 1e9:.3g}", f"{got['peak'] / 1e9:.3g}",
                f"{got['ratio']:.2f}", row["goal"],
            ])  # fmt: skip
    head = ["pass", "s_q", "s_kv", "ms", "inputs and outputs, GB", "peak, GB", "ratio", "goal"]
    return table(head, lines)


def merging(rows: list[Row], ceilings: Row) -> str:
    """Return the ways to merge."""
    lines = []
    for row in rows:
        for name, seconds in row["seconds"].items():
            copy = ceilings.get("copy")
            lines.append([
                row["s_q"], name, f"{1e6 * seconds:.3g}",
                f"{row['bytes'] / seconds / copy:.2f}" if copy else "",
                f"{100 * seconds / row['block seconds']:.2f}", f"{row['differs by'][name]:.1e}",
            ])  # fmt: skip
        lines += [[row["s_q"], name, why, "", "", ""] for name, why in row["failed"].items()]
    head = ["s_q", "way", "µs", "of copy rate", "% of a hop's attention to 75k keys", "differs by"]
    return table(head, lines)


def _ordered(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: item[1])

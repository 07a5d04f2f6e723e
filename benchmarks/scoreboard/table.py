"""The page of the scoreboard, written from stored outcomes."""

import re
import textwrap
from typing import Any

from benchmarks.scoreboard.outcome import DIFFERS, RIGHT

Json = dict[str, Any]

_HEAD = """# Scoreboard: published packages, held against the oracle

<!-- Written by python -m benchmarks.scoreboard: do not edit. -->

Every row is a function of a published package, installed in an environment of its own in the
version shown, and run through [the oracle](check.md) on CPUs. `python -m benchmarks.scoreboard
NAME`, with the name behind a function, installs one again, runs it and prints the full report, with
`--ranks P` on P ranks only, with `--suite full` in the full suite; `make scoreboard` does so with
all.
[Adapters](../benchmarks/scoreboard/adapters) of a few lines call each as its own documentation
says, and refuse what that documents as a limit: *unsupported*, in the words below the tables.

- **right**: every problem that the function takes, forward and backward as far as it has one.
- **right but for rows that see nothing**: where a mask hides all keys from a query, the oracle
  expects 0. NaN or the mean of the values is another meaning of such a row, and not a mistake
  unless the package says otherwise.
- **wrong**: numbers beyond the rounding of the dtype. What was confirmed by a plain softmax apart
  from the oracle is in [found](found.md), with a script each, and what is a difference in meaning;
  any other row is the oracle's word alone. Failures in float16 or bfloat16 only, such as
  *half-precision scores*, are of functions that round where the oracle's limit has no room for it.
- **raises**: errors that do not say that something is unsupported.

An lse is judged where one is returned, and the growth of the error with P on 4 ranks.
"""

_SAID = """## What each says

By package, most of its rows last. One line stands for all that differ only in numbers, or in the
cases that show it."""

_NOT_JUDGED = r"no lse was returned|growth of the error with P\b.*not judged"  # as the head says

_WIDTH = 100  # of lines, but for tables

_COLUMNS = [
    *("function", "package", "ranks", "suite", "result", "passed", "failed", "in", "diagnosis"),
    *("unsupported", "date"),
]


def page(outcomes: list[Json], seconds: Json | None = None) -> str:
    """Return the page in Markdown.

    Parameters
    ----------
    outcomes : list of dict
        Of `Outcome.as_json`.
    seconds : dict, optional
        Of `benchmarks.scoreboard.seconds`.
    """
    parts = [_HEAD] if outcomes else [_HEAD, "Nothing has been run."]
    for title, several in (("One process", False), ("Several ranks (gloo)", True)):
        rows = [outcome for outcome in outcomes if bool(outcome["ranks"]) is several]
        if rows:
            parts += [f"## {title}", _table(rows)]
    parts += [_seconds(seconds)] if seconds else []
    parts += [_SAID, *_details(outcomes)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _table(rows: list[Json]) -> str:
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    for row in rows:
        count = row["counts"]
        failed = count.get("wrong", 0) + count.get("error", 0)
        dead = count.get("dead", 0)
        bold = row["result"] in (RIGHT, DIFFERS)
        cells = [
            f"[{escaped(row['what'])}](#{package(row).replace(' ', '-')}), `{row['name']}`",
            f"{package(row)} {row['version']}".strip(),
            str(row["ranks"] or ""),
            row["suite"],
            row["result"] if bold else f"**{row['result']}**",
            f"{count.get('ok', 0)} of {sum(count.values()) - dead}" if count else "",
            f"{failed - dead}{f', and {dead} that see nothing' if dead else ''}" if count else "",
            ", ".join(row["dtypes"]),
            row["diagnosis"],
            str(count.get("unsupported", 0)) if count else "",
            row["date"],
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _seconds(seconds: Json) -> str:
    """Return the table of times, as ratios to this project's lv-xattn in the same run."""
    lines = [
        "## Seconds",
        "",
        *textwrap.wrap(
            "S_Q = 512, S_KV = 32,768, 8 heads of 64, fp32, medians of so many rounds in turns. "
            "lv-xattn is in seconds, the others are ratios to it: below 1 is faster. Gather, ring "
            "and Ulysses without a name are this project's, too. An empty cell: no backward there, "
            f"or a wrong one. {seconds['about']} `python -m benchmarks.scoreboard.seconds`, with "
            "--rate 1gbit for hosts of a network, measures again.",
            _WIDTH,
            break_on_hyphens=False,
        ),
        "",
    ]
    names = list(dict.fromkeys(name for run in seconds["runs"] for name in run["ratios"]))
    heads = ["ranks", "network", "pass", "rounds", "lv-xattn", *names]
    lines += [_line(heads), _line(["---"] * len(heads))]
    for run in seconds["runs"]:
        ratios = (f"{run['ratios'][name]:.2f}" if name in run["ratios"] else "" for name in names)
        cells = [str(run["ranks"]), run["network"], run["pass"], str(run.get("rounds", ""))]
        lines.append(_line([*cells, f"{run['seconds']:.3f}", *ratios]))
    return "\n".join(lines)


def _details(outcomes: list[Json]) -> list[str]:
    """Return a section for each package; a line that several of its rows say stands once."""
    sections: dict[str, list[Json]] = {}
    for outcome in outcomes:
        sections.setdefault(package(outcome), []).append(outcome)
    parts = []
    for name, rows in sections.items():
        lines = [f"### {name}", ""]
        said: dict[str, list[tuple[Json, str]]] = {}
        for row in rows:
            here: dict[str, str] = {}
            for text in _said(row):
                here.setdefault(_key(text), text)
            for key, text in here.items():
                said.setdefault(key, []).append((row, text))
        # What holds for most rows comes last: it is the least telling.
        for found in sorted(said.values(), key=len):
            lines += _item(found, rows)
        parts.append("\n".join(lines) if said else f"{lines[0]}\n\nNothing else.")
    return parts


def _item(found: list[tuple[Json, str]], rows: list[Json]) -> list[str]:
    """Return a line that some of the rows of a package say, and which these are."""
    text = found[0][1]
    some = [row for row, _ in found]
    if text.startswith("unsupported: "):  # whatever the ranks
        some = [row for row in rows if row["name"] in {row["name"] for row in some}]
    where = "" if len(some) == len(rows) else f"{_where(some, rows)}: "
    return textwrap.wrap(
        f"{where}{escaped(text)}",
        _WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _key(text: str) -> str:
    """Return what lines have in common that differ in numbers, or in the cases that show it."""
    if match := re.match(r"wrong \w+ in ", text):
        return match[0]
    if re.match(r"unsupported: |\d+: ", text):  # of sizes and lines of a file
        return re.sub(r"\d+|\S+\.main\.cp\S*|\(\S*$", "#", text)
    return text


def _where(some: list[Json], rows: list[Json]) -> str:
    """Return the names of the entries that say something, with the ranks unless they all do."""
    if 2 * len(some) > len(rows) and len({row["name"] for row in some}) > 2:
        return f"all but {_named([row for row in rows if row not in some], rows)}"
    return _named(some, rows)


def _named(some: list[Json], rows: list[Json]) -> str:
    ranks: dict[str, list[int]] = {}
    for row in some:
        ranks.setdefault(row["name"], []).append(row["ranks"])
    names = []
    for name, numbers in ranks.items():
        every = [row["ranks"] for row in rows if row["name"] == name]
        names.append(f"`{name}`" + (numbers != every) * f" on {' and '.join(map(str, numbers))}")
    return ", ".join(names)


def _said(outcome: Json) -> list[str]:
    remarks = [text for text in outcome["remarks"] if not re.match(_NOT_JUDGED, text)]
    unsupported = [f"unsupported: {text.partition(': ')[2]}" for text in outcome["unsupported"]]
    # Files that a compiler made have names of one run.
    findings = [re.sub(r"/tmp/\S+/", "", text) for text in outcome["findings"]]
    return [*findings, *unsupported, *remarks]


def package(row: Json) -> str:
    """Return the name of the package, without extras: it is the heading of a section, too."""
    return str(row["package"]).partition("[")[0] or "this project"


def escaped(text: str) -> str:
    """Return text in which Markdown sees no markup, on one line."""
    text = " ".join(text.split())
    for sign in "\\`*_[]<>|#$":
        text = text.replace(sign, f"\\{sign}")
    return text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

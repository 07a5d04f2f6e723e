"""The page of the scoreboard, written from stored outcomes."""

import textwrap
from typing import Any

from benchmarks.scoreboard.outcome import DIFFERS, RIGHT

Json = dict[str, Any]

_HEAD = """# Scoreboard: published packages, held against the oracle

<!-- Written by python -m benchmarks.scoreboard: do not edit. -->

Every row is a function of a published package, installed in an environment of its own in the
version shown, and run through [the oracle](check.md) on CPUs. `python -m benchmarks.scoreboard
NAME` installs one again, runs it and prints the full report; `make scoreboard` does so with all.
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
"""

_WIDTH = 100  # of lines, but for tables

_COLUMNS = [
    *("function", "package", "ranks", "result", "passed", "failed", "in", "diagnosis"),
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
    suites = {outcome["suite"] for outcome in outcomes}
    parts = [
        _HEAD,
        f"Suite: {' and '.join(sorted(suites))}." if suites else "Nothing has been run.",
    ]
    for title, several in (("One process", False), ("Several ranks (gloo)", True)):
        rows = [outcome for outcome in outcomes if bool(outcome["ranks"]) is several]
        if rows:
            parts += [f"## {title}", _table(rows)]
    parts += [_seconds(seconds)] if seconds else []
    parts += ["## What each says", *_details(outcomes)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _table(rows: list[Json]) -> str:
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    for row in rows:
        count = row["counts"]
        failed = count.get("wrong", 0) + count.get("error", 0)
        dead = count.get("dead", 0)
        bold = row["result"] in (RIGHT, DIFFERS)
        cells = [
            f"[{escaped(row['what'])}](#{anchor(row)})",
            f"{row['package'] or 'this project'} {row['version']}".strip(),
            str(row["ranks"] or ""),
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
            f"{seconds['about']} The column of lv-xattn is in seconds, the others are ratios to "
            "it: below 1 is faster. `python -m benchmarks.scoreboard.seconds` measures again.",
            _WIDTH,
        ),
        "",
    ]
    names = list(dict.fromkeys(name for run in seconds["runs"] for name in run["ratios"]))
    heads = ["ranks", "network", "pass", "lv-xattn", *names]
    lines += [_line(heads), _line(["---"] * len(heads))]
    for run in seconds["runs"]:
        ratios = (f"{run['ratios'][name]:.2f}" if name in run["ratios"] else "" for name in names)
        cells = [str(run["ranks"]), run["network"], run["pass"], f"{run['seconds']:.3f}", *ratios]
        lines.append(_line(cells))
    return "\n".join(lines)


def _details(outcomes: list[Json]) -> list[str]:
    """Return a section for each entry, whose ranks may agree."""
    sections: dict[str, list[Json]] = {}
    for outcome in outcomes:
        sections.setdefault(outcome["name"], []).append(outcome)
    parts = []
    for name, found in sections.items():
        lines = [f"### {anchor(found[0])}", "", f"`python -m benchmarks.scoreboard {name}`", ""]
        said: dict[str, list[str]] = {}
        for outcome in found:
            where = f"{outcome['ranks']} ranks" if outcome["ranks"] else "one process"
            for text in _said(outcome):
                said.setdefault(text, []).append(where)
        for text, wheres in said.items():
            everywhere = len(wheres) == len(found)
            text = f"{'' if everywhere else ', '.join(wheres) + ': '}{escaped(text)}"
            lines.append(
                textwrap.fill(
                    text,
                    _WIDTH,
                    initial_indent="- ",
                    subsequent_indent="  ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        parts.append("\n".join(lines))
    return parts


def _said(outcome: Json) -> list[str]:
    found = [f"unsupported, {text}" for text in outcome["unsupported"]]
    return [*outcome["findings"], *found, *outcome["remarks"]]


def anchor(row: Json) -> str:
    """Return the heading of an entry, which is its link, too."""
    return str(row["name"]).replace(".", "-")


def escaped(text: str) -> str:
    """Return text in which Markdown sees no markup, on one line."""
    text = " ".join(text.split())
    for sign in "\\`*_[]<>|#$":
        text = text.replace(sign, f"\\{sign}")
    return text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

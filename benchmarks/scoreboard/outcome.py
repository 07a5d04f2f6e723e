"""What became of one entry: read from the check's JSON report, or from how its process ended.

Rows that see nothing are counted apart: that they give 0 is this project's meaning of them. Others
give NaN or the mean of the values, which is no mistake unless they say otherwise.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from benchmarks.scoreboard.entries import Entry
from benchmarks.scoreboard.environments import ROOT
from lvxattn.check.cases import case_of

RIGHT, DIFFERS, WRONG, RAISES = "right", "right but for rows that see nothing", "wrong", "raises"
UNSUPPORTED, ABSENT, SILENT = "unsupported", "cannot be installed", "no report"

_DEAD = ("dead rows", "all dead", "minus infinity")  # masks
_MOST = 6  # reasons
Json = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One entry on one number of ranks.

    Attributes
    ----------
    name, package, version, what : str
        As in `Entry`.
    ranks : int
        0: one process.
    suite, date : str
    result : str
        One of the words above.
    counts : dict
        Problems by ``"ok"``, ``"wrong"``, ``"error"``, ``"unsupported"`` and, of those that failed,
        ``"dead"``: in a case with rows that see nothing.
    dtypes : list of str
        Those in which something failed, but for rows that see nothing.
    diagnosis : str
        The known defects that explain most failures, by their names.
    findings : list of str
        What the check says of the failures; the errors; the last words of a process without report.
    unsupported : list of str
        The adapter's and the package's reasons.
    remarks : list of str
        What was not judged.
    worst : float or str
        The largest error over its limit.
    seconds : float
    """

    name: str
    package: str
    version: str
    what: str
    ranks: int
    suite: str
    result: str
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d}")
    counts: dict[str, int] = field(default_factory=dict)
    dtypes: list[str] = field(default_factory=list)
    diagnosis: str = ""
    findings: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    worst: float | str = 0.0
    seconds: float = 0.0

    def as_json(self) -> Json:
        """Return plain types."""
        return asdict(self)


def without_report(entry: Entry, ranks: int, suite: str, result: str, words: str) -> Outcome:
    """Return the outcome of an entry that could not be installed, or gave no report."""
    named = (entry.name, entry.package, entry.version, entry.what)
    return Outcome(*named, ranks, suite, result, findings=[words])


def of_report(entry: Entry, ranks: int, report: Json) -> Outcome:
    """Return the outcome of an entry from the report of its check."""
    rows: list[Json] = report["rows"]
    counts = Counter(row["status"] for row in rows)
    failed = [row for row in rows if row["status"] in ("wrong", "error")]
    alive = [row for row in failed if not _sees_nothing(row["case"])]
    counts["dead"] = len(failed) - len(alive)
    if any(row["status"] == "wrong" for row in alive):
        result = WRONG
    elif alive:
        result = RAISES
    elif failed:
        result = DIFFERS
    else:
        result = RIGHT if counts["ok"] else UNSUPPORTED
    notes = [note for note in report["notes"] if not note.endswith((" rank", " ranks"))]
    about = [note for note in notes if note.startswith(("fails ", "smallest "))]
    findings = [report["probably"]] if report["probably"] else []
    return Outcome(
        *(entry.name, entry.package, entry.version, entry.what),
        ranks,
        report["suite"],
        result,
        counts=dict(counts),
        dtypes=list(dict.fromkeys(row["dtype"] for row in alive)),
        diagnosis=", ".join(dict.fromkeys(report["probably"].split("*")[1::2])),
        findings=[*findings, *about, *_reasons(failed), *_by_result(alive)],
        unsupported=_reasons([row for row in rows if row["status"] == "unsupported"]),
        remarks=[note for note in notes if note not in about],
        worst=report["worst_ratio"],
        seconds=round(report["seconds"], 1),
    )


def _sees_nothing(case: str) -> bool:
    try:
        return case_of(case.partition(".by-")[0]).mask in _DEAD
    except ValueError:  # such as the case that shows growth with the number of ranks
        return False


def _reasons(rows: list[Json]) -> list[str]:
    """Return the messages of rows, the most frequent first, with their numbers."""
    count = Counter(_short(row["message"]) for row in rows if row["message"])
    return [f"{n}: {text[:240]}" for text, n in count.most_common(_MOST)]


def _short(message: str) -> str:
    """Return one line without the folders of this machine."""
    line = re.sub(r"/\S*/site-packages/", "", " ".join(message.split()))
    return re.sub(rf"{re.escape(str(ROOT))}\S*/(?=\w+\.py)", "", line)


def _by_result(rows: list[Json]) -> list[str]:
    """Return which results are wrong, and in which cases."""
    cases: dict[str, dict[str, None]] = {}
    for row in rows:
        for verdict in row["verdicts"]:
            if not verdict["passed"]:
                cases.setdefault(verdict["name"], {})[row["case"]] = None
    return [
        f"wrong {name} in {len(names)} cases: {', '.join([*names][:_MOST])}"
        + ", ..." * (len(names) > _MOST)
        for name, names in cases.items()
    ]

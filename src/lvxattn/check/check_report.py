"""The report of a check: as a table, as JSON, or raised as an error."""

import inspect
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

import lvxattn
from lvxattn.check.judge import Verdict
from lvxattn.check.wrong import KERNELS
from lvxattn.common.new_file import write_file

SCHEMA = 1
_FEW = 1e5  # ulps; larger numbers are not shown
_SHOWN = 12  # kinds of failures of which one is shown in full
_NAMED = 4  # others of a kind


@dataclass(frozen=True)
class Row:
    """One case in one dtype, with one seed.

    Attributes
    ----------
    case, group, reason : str
    dtype : str
    seed : int
    status : str
        ``"ok"``, ``"wrong"`` (numbers), ``"error"`` (it raised, exceeded the time limit, or
        returned invalid results) or ``"unsupported"`` (NotImplementedError).
    verdicts : tuple of Verdict
        Of the returned results.
    message : str
        The error, or why the case is unsupported.
    diagnosis : str
        The known defects that it resembles.
    seconds : float
    where : str
        Ranks and cuts, of a distributed function.
    note : str
        Why there are no gradients, if they were requested.
    """

    case: str
    group: str
    reason: str
    dtype: str
    seed: int
    status: str
    verdicts: tuple[Verdict, ...] = ()
    message: str = ""
    diagnosis: str = ""
    seconds: float = 0.0
    where: str = ""
    note: str = ""

    @property
    def worst(self) -> Verdict | None:
        """The verdict with the largest ratio, if any."""
        return max(self.verdicts, key=lambda verdict: verdict.ratio, default=None)

    @property
    def ratio(self) -> float:
        """The largest error over its limit; 0 if nothing was judged."""
        return self.worst.ratio if self.worst else 0.0


@dataclass(frozen=True, repr=False)
class Report:
    """The outcome of a check.

    Attributes
    ----------
    target : str
        The function.
    suite, framework : str
    rows : tuple of Row
    seconds : float
    notes : tuple of str
        Remarks on the check as a whole.
    probably : str
        The known defects that explain most of the failures.
    versions : dict
        Of Python and packages, by name.
    """

    target: str
    suite: str
    framework: str
    rows: tuple[Row, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    probably: str = ""
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that are wrong or ended in an error."""
        return tuple(row for row in self.rows if row.status in ("wrong", "error"))

    @property
    def passed(self) -> bool:
        """Whether something was judged and nothing failed."""
        return not self.failed and any(row.status == "ok" for row in self.rows)

    @property
    def worst_ratio(self) -> float:
        """The largest error over its limit; 0 if nothing was judged."""
        return max((row.ratio for row in self.rows), default=0.0)

    def raise_if_failed(self) -> None:
        """Raise an error with the full report unless it passed.

        Raises
        ------
        AssertionError
        """
        if not self.passed:
            raise AssertionError(str(self))

    def to_json(self, path: str | Path) -> None:
        """Write everything to a JSON file.

        Parameters
        ----------
        path : str
            Infinities and NaN are written as strings.

        Raises
        ------
        OSError
            The file cannot be written; it names the file, which is as it was before.
        """
        write_file(path, self.as_json() + "\n")

    def as_json(self) -> str:
        """Format as `to_json` writes it."""
        found = {
            "schema": SCHEMA,
            **{name: x for name, x in asdict(self).items() if name != "rows"},
            "passed": self.passed,
            "worst_ratio": self.worst_ratio,
            "rows": [_row(row) for row in self.rows],
        }
        return json.dumps(_plain(found), indent=1, allow_nan=False)

    def __repr__(self) -> str:
        """Return one line."""
        return f"<Report of {self.target}: {self._count()}>"

    def __str__(self) -> str:
        """Return the table, the failures and a summary."""
        title = f"LV-XAttn check of {self.target}: {self.suite} suite, {self.framework}\n"
        parts = [title, self._table(), *self._failures(), self._summary()]
        return "\n".join(part for part in parts if part)

    def _table(self) -> str:
        """Return the largest error over its limit, by case and dtype."""
        if not self.rows:
            return ""
        dtypes = list(dict.fromkeys(row.dtype for row in self.rows))
        rows: dict[str, dict[str, list[Row]]] = {}
        for row in self.rows:
            many = row.group == "combinations" and row.status not in ("wrong", "error")
            rows.setdefault("combinations" if many else row.case, {}).setdefault(
                row.dtype, []
            ).append(row)
        table = [["error / limit", *dtypes]]
        table += [
            [case, *(_cell(by.get(dtype, [])) for dtype in dtypes)] for case, by in rows.items()
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            f"  {case:{widths[0]}}"
            + "".join(f"   {cell:>{n}}" for cell, n in zip(cells, widths[1:], strict=True))
            for case, *cells in table
        ]
        return "\n".join(lines) + "\n"

    def _failures(self) -> Iterable[str]:
        """Yield the lines of the failures; of those of a kind, one is shown."""
        alike: dict[Any, list[Row]] = {}
        for row in self.failed:
            alike.setdefault(_kind(row), []).append(row)
        groups = list(alike.values())
        for rows in groups[:_SHOWN]:
            first = max(rows, key=lambda row: sum(not v.passed for v in row.verdicts))
            others = [row for row in rows if row is not first]
            if others and _rounds(first):
                count = f"{len(others) + 1} cases in {first.dtype}"
                yield f"  {_names(first)}: {count}, as {first.case}"
                continue
            yield f"  {_name(first)}: {first.reason}"
            if first.message:
                yield f"    {first.message}"
            if first.verdicts and first.status == "error":
                yield "    the forward alone is right"
            for verdict in first.verdicts:
                if not verdict.passed:
                    yield from (f"    {line}" for line in _wrong_lines(verdict, first.dtype))
            if first.diagnosis:
                yield f"    {first.diagnosis}"
            if others:
                cases = list(dict.fromkeys(row.case for row in others))
                names = ", ".join(cases[:_NAMED]) + ", ..." * (len(cases) > _NAMED)
                yield f"    and {len(others)} more alike: {names}"
        if len(groups) > _SHOWN:
            yield f"  and {sum(map(len, groups[_SHOWN:]))} more failures"
        if self.failed:
            yield ""

    def _count(self) -> str:
        count = Counter(row.status for row in self.rows)
        parts = [f"{count['ok']} of {len(self.rows)} passed"]
        parts += [f"{count[s]} {s}" for s in ("wrong", "error", "unsupported") if count[s]]
        return ", ".join(parts)

    def _summary(self) -> str:
        judged = [row for row in self.rows if row.worst]
        worst = max(judged, key=lambda row: row.ratio, default=None)
        far = f"largest error {_number(self.worst_ratio)} of its limit" if worst else ""
        where = f" ({_name(worst)})" if worst else ""
        seconds = f"{self.seconds:.1f} s"
        lines = [f"  {'; '.join(part for part in (self._count(), far + where, seconds) if part)}"]
        reasons = Counter(row.message for row in self.rows if row.status == "unsupported")
        lines += [f"  {n} unsupported: {text}" for text, n in reasons.most_common(_SHOWN)]
        if len(reasons) > _SHOWN:
            lines.append(f"  and {len(reasons) - _SHOWN} more reasons for unsupported cases")
        lines += [f"  {note}" for note in self.notes]
        if self.probably:
            lines.append(f"  {self.probably}")
            names = dict.fromkeys(self.probably.split("*")[1::2])
            lines += [f"    {name}: {inspect.getdoc(KERNELS[name])}" for name in names]
        if not self.failed and not self.passed:
            lines.append("  nothing was judged")
        return "\n".join(lines)


def _kind(row: Row) -> Any:
    """Return what failures of one kind have in common."""
    if row.diagnosis:
        return _names(row), row.dtype if _rounds(row) else ""
    if row.message:
        return row.message
    return row.group, row.dtype, *(verdict.name for verdict in row.verdicts if not verdict.passed)


def _names(row: Row) -> str:
    """Return the names in a row's diagnosis."""
    return " or ".join(row.diagnosis.split("*")[1::2])


def _rounds(row: Row) -> bool:
    """Whether a failure is one of a function that rounds too much: others of it tell no more."""
    names = row.diagnosis.split("*")[1::2]
    return bool(names) and all(KERNELS[name].compare == "size" for name in names)


def _row(row: Row) -> dict[str, Any]:
    verdicts = [asdict(v) | {"passed": v.passed} for v in row.verdicts]
    return asdict(row) | {"verdicts": verdicts}


def _cell(rows: list[Row]) -> str:
    """Return the worst of a case's rows of one dtype."""
    if not rows:
        return ""
    if any(row.status == "error" for row in rows):
        return "ERROR"
    judged = [row.worst for row in rows if row.worst]
    if not judged:
        return "unsupported"
    worst = max(judged, key=lambda verdict: verdict.ratio)
    mark = "" if worst.passed else "WRONG "
    return f"{mark}{worst.name} {_number(worst.ratio)}"


def _wrong_lines(verdict: Verdict, dtype: str) -> Iterable[str]:
    """Yield the lines of a wrong result."""
    at = f"  at {verdict.index} got {verdict.got:.6g}, expected {verdict.expected:.6g}"
    if verdict.what:  # the numbers below would be about finite elements
        yield f"{verdict.name}: {verdict.what}"
        yield at
        return
    yield f"{verdict.name}: relative error {verdict.error:.1e}, limit {verdict.limit:.1e}"
    near = f", {verdict.ulps:.0f} ulps, {verdict.flash:.2g} times that of plain {dtype}"
    yield f"{at}; largest error {verdict.max_abs:.1e}{near if verdict.ulps < _FEW else ''}"


def _name(row: Row) -> str:
    seed = f", seed {row.seed}" if row.seed else ""
    return f"{row.case}, {row.dtype}{seed}{f', {row.where}' if row.where else ''}"


def _number(x: float) -> str:
    return "inf" if x == inf else f"{x:.2f}" if x < 100 else f"{x:.0e}"


def _plain(x: Any) -> Any:
    """Convert to types of strict JSON."""
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return str(x) if isinstance(x, float) and not isfinite(x) else x


def _versions() -> dict[str, str]:
    found = {"lvxattn": lvxattn.__version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "jax", "cupy"):
        if name in sys.modules:  # a version is no reason to import a package
            found[name] = str(getattr(sys.modules[name], "__version__", "?"))
    return found

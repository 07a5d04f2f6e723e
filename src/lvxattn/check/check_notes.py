"""Remarks on a check as a whole, for the last lines of its report."""

from collections import Counter
from collections.abc import Sequence

from lvxattn.check.check_report import Row
from lvxattn.check.frameworks import Framework

_SHOWN = 5  # reasons for no gradients


def notes_of(
    framework: Framework,
    rows: Sequence[Row],
    wanted: Sequence[str],
    abandoned: int = 0,
    ending: str = "",
) -> list[str]:
    """Return remarks on the check as a whole.

    Parameters
    ----------
    framework : Framework
    rows : sequence of Row
    wanted : sequence of str
        The requested dtypes.
    abandoned : int
        Number of calls that could not be ended.
    ending : str
        How the function's process has ended, if not as it should.
    """
    missing = framework.missing
    notes = [f"{dtype} was left out: {missing[dtype]}" for dtype in wanted if dtype in missing]
    judged = [row for row in rows if row.verdicts]
    count = Counter(row.note for row in judged if row.note)
    for why, n in count.most_common(_SHOWN):
        part = f"no gradients in {n} of {len(judged)}"
        notes.append(f"{'forward only' if n == len(judged) else part}: {why}")
    if len(count) > _SHOWN:
        notes.append(f"and {len(count) - _SHOWN} more reasons for no gradients")
    if raised := sum(row.status == "error" for row in judged):
        forward = [[v.passed for v in row.verdicts if v.name in ("out", "lse")] for row in judged]
        right = f"right in {sum(map(all, forward))} of {len(judged)}"
        notes.append(f"the backward raised in {raised}; the forward alone is {right}")
    if judged and not any(v.name == "lse" for row in judged for v in row.verdicts):
        notes.append("no lse was returned, and none judged")
    if abandoned:
        notes.append(
            f"calls that did not come back and could not be ended: {abandoned}, "
            "which may have slowed down what followed"
        )
    return [*notes, ending] if ending else notes

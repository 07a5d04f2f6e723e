"""One case by itself, without a report around it."""

from lvxattn.check.cases import Case
from lvxattn.check.diagnosis import Suspects
from lvxattn.check.judge import Verdict
from lvxattn.check.report import Row
from lvxattn.check.suite import Player, judged


def diagnosed(player: Player, case: Case, dtype: str, seed: int) -> Row:
    """Run one case, judge it, and say what it looks like."""
    suspects = Suspects()
    row = judged(player, case, dtype, seed, suspects)
    (row,), _ = suspects.conclude([row], {case.name: case})
    return row


def wrong_in(verdict: Verdict) -> str:
    """Return what is wrong with a result, in a line."""
    far = f"relative error {verdict.error:.1e}, limit {verdict.limit:.1e}; worst"
    what = f"{verdict.what};" if verdict.what else far
    return (
        f"{verdict.name}: {what} at {verdict.index} got {verdict.got:.6g}, "
        f"expected {verdict.expected:.6g}"
    )

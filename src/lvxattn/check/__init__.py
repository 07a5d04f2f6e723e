"""The oracle: check any attention function against the reference.

    from lvxattn.check import check

    check(my_attention).raise_if_failed()

The README beside this file describes the limit, the cases and the report.
"""

from lvxattn.check.case_arrays import Problem, draw
from lvxattn.check.cases import Case, case_of, suite_of
from lvxattn.check.check_report import Report, Row
from lvxattn.check.distributed import check_distributed
from lvxattn.check.golden_data import golden, golden_names
from lvxattn.check.judge import Verdict
from lvxattn.check.suite import check

__all__ = [
    "Case",
    "Problem",
    "Report",
    "Row",
    "Verdict",
    "case_of",
    "check",
    "check_distributed",
    "draw",
    "golden",
    "golden_names",
    "suite_of",
]

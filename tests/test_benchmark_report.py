"""The report of `benchmarks/network.py`: what is stored is what was measured, and who is judged."""

import json
from pathlib import Path

from benchmarks.report import SMALL, markdown

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = json.loads((RESULTS / "network.json").read_text())


def test_the_stored_report_is_that_of_the_stored_measurements() -> None:
    assert markdown(MEASURED) == (RESULTS / "network.md").read_text()


def test_the_small_version_judges_what_is_counted_and_nothing_that_is_timed() -> None:
    small = markdown({**MEASURED, "quick": True})
    judged = [line for line in small.splitlines() if line.startswith(("- met", "- **missed**"))]
    assert SMALL in small
    assert len(judged) == 2
    assert "counters within" in judged[0]
    assert "placement" in judged[1]

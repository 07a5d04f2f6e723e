"""The report of `benchmarks/network.py`: what is stored is what was measured, and who is judged."""

import json
from pathlib import Path

from benchmarks.network_report import SMALL, markdown

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = json.loads((RESULTS / "network.json").read_text())


def test_stored_report_matches_stored_measurements() -> None:
    assert markdown(MEASURED) == (RESULTS / "network.md").read_text()


def test_small_version_judges_counts_only() -> None:
    small = markdown({**MEASURED, "quick": True})
    judged = [line for line in small.splitlines() if line.startswith(("- met", "- **missed**"))]
    assert SMALL in small
    assert len(judged) == 2
    assert "counters within" in judged[0]
    assert "placement" in judged[1]

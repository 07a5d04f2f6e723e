"""The report of `benchmarks/network.py`: what is stored is what was measured, and who is judged."""

import json
from pathlib import Path

import pytest

from benchmarks.network_report import SMALL, markdown
from tests.launch import mpiexec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
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


@pytest.mark.mpi
def test_passes_run_with_communication_off() -> None:
    kinds = ["none", "lv-xattn", "ring"]
    work = {"kinds": kinds, "S_Q": 8, "S_KV": 64, "backward": True, "rounds": 1}
    ended = mpiexec(2, BENCHMARKS / "passes.py", json.dumps([work]))
    assert ended.status == 0, ended.err
    (result,) = json.loads(ended.out)["results"]
    sent = {kind: turn["bytes"][0] for kind, (turn,) in result["turns"].items()}
    assert sent["none"] == sent["lv-xattn"] < sent["ring"]  # counted alike, and not sent

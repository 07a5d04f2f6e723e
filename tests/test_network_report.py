"""Reports of benchmarks on a network: what is stored is what was measured, and who is judged."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.network_report import SMALL, markdown
from lvxattn import reference
from lvxattn.reference import Segments
from tests.launch import mpiexec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
MEASURED = json.loads((RESULTS / "network.json").read_text())


def test_stored_report_matches_stored_measurements() -> None:
    assert markdown(MEASURED) == (RESULTS / "network.md").read_text()


def test_stored_report_of_models_matches_its_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    measured = json.loads((RESULTS / "models.json").read_text())
    assert import_module("models").markdown(measured) == (RESULTS / "models.md").read_text()


def test_stored_report_of_decoding_matches_its_measurements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    measured = json.loads((RESULTS / "decode.json").read_text())
    assert import_module("decode").markdown(measured) == (RESULTS / "decode.md").read_text()


def test_stored_report_of_rules_matches_its_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    measured = json.loads((RESULTS / "rules.json").read_text())
    assert import_module("rules").markdown(measured) == (RESULTS / "rules.md").read_text()


def test_a_rule_s_cost_and_bytes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    rules = import_module("rules")
    texts, images = (3, 5, 4), (30, 20, 40)
    rule = Segments(texts, images)
    found = rules.measure_rule(reference, rule, sum(texts), sum(images), rounds=1)
    assert found["visible"] == pytest.approx((90 + 100 + 160) / (12 * 90))
    assert [len(found[name]) for name in ("forward", "with backward")] == [2, 2]
    known = {"visible": 0.25, "forward": [[2.0], [0.6]]}
    assert rules.ratio(known, "forward") == pytest.approx(1.2)
    for schedule in ("lv-xattn", "ring"):
        with_it, without = rules.sent(rule, sum(texts), sum(images), schedule)
        assert 0 < with_it < without


@pytest.mark.mpi
def test_a_decode_step_runs_with_its_messages_and_without(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    work = {"store": str(tmp_path / "store"), "S_KV": 64, "rounds": 1, "seconds": 10}
    ended = mpiexec(2, BENCHMARKS / "decode.py", "--on-a-rank", json.dumps(work))
    assert ended.status == 0, ended.err
    turns = json.loads(ended.out.splitlines()[-1])["turns"]
    assert len(turns) == 2 * (3 * 2 + 2)
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in turns.values())


def test_small_version_judges_counts_only() -> None:
    small = markdown({**MEASURED, "quick": True})
    judged = [line for line in small.splitlines() if line.startswith(("- met", "- **missed**"))]
    assert SMALL in small
    assert len(judged) == 2
    assert "counters within" in judged[0]
    assert "placement" in judged[1]


@pytest.mark.mpi
def test_passes_run_with_communication_off() -> None:
    kinds = ["none", "blocks", "lv-xattn", "ring"]
    work = {"kinds": kinds, "S_Q": 8, "S_KV": 64, "backward": True, "rounds": 1}
    ended = mpiexec(2, BENCHMARKS / "passes.py", json.dumps([work]))
    assert ended.status == 0, ended.err
    (result,) = json.loads(ended.out)["results"]
    sent = {kind: turn["bytes"][0] for kind, (turn,) in result["turns"].items()}
    assert sent["none"] == sent["lv-xattn"] < sent["ring"]  # counted alike, and not sent
    assert sent["blocks"] == 0


@pytest.mark.mpi
@pytest.mark.slow
def test_steps_of_models_run_with_messages_off(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    kinds = ["none", "lv-xattn", "replicated", "kept", "ring"]
    works = [
        {"model": name, "kinds": kinds, "text_tokens": 8, "features": features, "rounds": 1}
        for name, features in (("llama3v", 64), ("owl3", 1458))
    ]
    program, options = BENCHMARKS / "model_passes.py", json.dumps(works)
    ended = mpiexec(2, program, str(tmp_path / "store"), options)
    assert ended.status == 0, ended.err
    for result in json.loads(ended.out)["results"]:
        turns = {kind: turn for kind, (turn,) in result["turns"].items()}
        sent = {kind: turn["bytes"][0] for kind, turn in turns.items()}
        assert sent["none"] == sent["lv-xattn"] == sent["kept"] < sent["ring"]
        assert sent["replicated"] < sent["lv-xattn"]  # no self-attention over ranks

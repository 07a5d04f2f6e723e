"""The scoreboard: what it runs, and what it writes of it; nothing comes from a network here."""

import ast
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scoreboard.__main__ import PAGE, RESULTS, main
from benchmarks.scoreboard.entries import PINNED, Entry, chosen, entries
from benchmarks.scoreboard.environments import NotInstallableError, last_words, python_of
from benchmarks.scoreboard.outcome import (
    ABSENT,
    DIFFERS,
    RAISES,
    RIGHT,
    SILENT,
    UNSUPPORTED,
    WRONG,
    of_report,
    without_report,
)
from benchmarks.scoreboard.processes import run
from benchmarks.scoreboard.seconds import measured
from benchmarks.scoreboard.table import page
from tests.launch import ROOT

LIST = """
[environment]
none = ["numpy==2.0.0"]

[entry.nan]
package = "numpy"
what = "attention | in NumPy"
environment = "none"
adapter = "tests.programs.scoreboard_adapter:attention"
framework = "numpy"
options = ["--dtypes", "float64"]

[entry.gone]
what = "a function that is not there"
environment = "none"
adapter = "tests.programs.scoreboard_adapter:gone"
framework = "numpy"
"""

ENTRY = Entry("mine", "numpy", "attention", "none", ("numpy==2.0.0",), "mine:attention", "numpy")


def row(case: str, status: str, message: str = "", passed: bool = True) -> dict:
    verdicts = [{"name": "out", "passed": passed}] if status in ("ok", "wrong") else []
    shown = {"case": case, "dtype": "float32", "status": status}
    return shown | {"message": message, "verdicts": verdicts}


def report(*rows: dict, probably: str = "", notes: tuple[str, ...] = ()) -> dict:
    return {
        "rows": [*rows],
        "notes": [*notes],
        "probably": probably,
        "suite": "quick",
        "worst_ratio": 0.5,
        "seconds": 1.0,
    }


def test_every_entry_is_pinned_and_has_an_adapter():
    every = entries()
    assert len({entry.name for entry in every}) == len(every) > 30
    for entry in every:
        assert not entry.package or entry.version, entry.name
        assert all(re.fullmatch(r"[\w\[\]-]+==[\w.+]+", pin) for pin in entry.requires)
        module, _, function = entry.adapter.partition(":")
        path = PINNED.parent / "adapters" / f"{module}.py"
        names = [node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")]
        assert function in names, entry.name


def test_a_bad_list_is_refused(tmp_path):
    path = tmp_path / "list.toml"
    for wrong, words in (
        (LIST.replace("==2.0.0", ""), "environment none: expected NAME==VERSION, got 'numpy'"),
        (LIST.replace('"none"', '"other"'), "nan: expected an environment of none, got 'other'"),
        (LIST.replace("framework", "frame"), "nan: expected 'framework'"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=re.escape(words)):
            entries(path)


def test_entries_are_chosen_by_how_they_begin():
    every = entries()
    assert [entry.name for entry in chosen(["sdpa-f", "mlx"], every)] == ["sdpa-flash", "mlx"]
    assert [entry.name for entry in chosen(["jax"], every)] == ["jax"]  # not jax-residual
    assert chosen([], every) == every
    with pytest.raises(ValueError, match=r"NAME: expected one of sdpa, .*got 'nothing'"):
        chosen(["nothing"], every)


@pytest.mark.parametrize(
    ("rows", "result", "dead"),
    [
        ([row("gaussian", "ok")], RIGHT, 0),
        ([row("gaussian", "ok"), row("padding-mask", "unsupported", "no masks")], RIGHT, 0),
        ([row("gaussian", "unsupported", "no")], UNSUPPORTED, 0),
        ([row("gaussian", "ok"), row("dead-rows", "wrong", passed=False)], DIFFERS, 1),
        ([row("gaussian", "ok"), row("dead-rows.by-3", "wrong", passed=False)], DIFFERS, 1),
        ([row("gaussian", "wrong", passed=False), row("square", "error", "x")], WRONG, 0),
        ([row("gaussian", "ok"), row("square", "error", "RuntimeError: x")], RAISES, 0),
        ([row("growth", "wrong", passed=False)], WRONG, 0),
    ],
)
def test_results(rows, result, dead):
    found = of_report(ENTRY, 0, report(*rows))
    assert (found.result, found.counts["dead"]) == (result, dead)


def test_the_page_says_what_was_found():
    wrong = report(
        row("gaussian", "wrong", passed=False),
        row("square", "error", "RuntimeError: a | b"),
        row("one-key", "unsupported", "takes no <mask>"),
        probably="probably *no scale*: explains 1 of 1 failures",
        notes=("2 ranks", "no lse was returned, and none judged", "fails only where B > 1: x"),
    )
    right = report(row("gaussian", "ok"), notes=("3 ranks",))
    outcomes = [
        of_report(ENTRY, 2, wrong).as_json(),
        of_report(ENTRY, 3, right).as_json(),
        without_report(ENTRY, 0, "full", ABSENT, "ERROR: No matching distribution").as_json(),
    ]
    lines = page(outcomes).splitlines()
    start = "| [attention](#numpy), `mine` | numpy 2.0.0 |"
    assert [
        re.sub(r"\d{4}-\d\d-\d\d", "DATE", line) for line in lines if "[attention]" in line
    ] == [
        f"{start}  | full | **cannot be installed** |  |  |  |  |  | DATE |",
        f"{start} 2 | quick | **wrong** | 0 of 3 | 2 | float32 | no scale | 1 | DATE |",
        f"{start} 3 | quick | right | 1 of 1 | 0 |  |  | 0 | DATE |",
    ]
    said = lines[lines.index("### numpy") :]
    for words in (
        r"- `mine` on 2: probably \*no scale\*: explains 1 of 1 failures",
        "- `mine` on 2: fails only where B \\> 1: x",
        r"- `mine` on 2: 1: RuntimeError: a \| b",
        "- `mine` on 2: wrong out in 1 cases: gaussian",
        r"- unsupported: takes no \<mask\>",
        "- `mine` on 0: ERROR: No matching distribution",
    ):
        assert words in said
    assert "no lse was returned" not in " ".join(said)  # the head says it once


def test_lines_that_rows_have_in_common_stand_once():
    entries = [replace(ENTRY, name=name) for name in "abcd"]
    rows = [row("square", "error", f"shape {n} is invalid") for n in range(4)]
    notes = [("x", "everywhere"), ("x", "everywhere"), ("x", "everywhere"), ("everywhere",)]
    outcomes = [
        of_report(entry, 0, report(each, notes=some)).as_json()
        for entry, each, some in zip(entries, rows, notes, strict=True)
    ]
    said = page(outcomes).partition("### numpy\n\n")[2].splitlines()
    assert said == ["- all but `d`: x", "- 1: shape 0 is invalid", "- everywhere"]


def test_no_folder_of_the_machine_is_written_down():
    where = f"({ROOT}/benchmarks/scoreboard/adapters/mine.py:3)"
    error = f"ValueError: x (/home/me/env/lib/python3.11/site-packages/peer/ring.py:7) {where}"
    found = of_report(ENTRY, 0, report(row("square", "error", error)))
    assert found.findings[0] == "1: ValueError: x (peer/ring.py:7) (mine.py:3)"


def test_the_machinery(tmp_path, capsys):
    """In one process: a function that is judged, then one that cannot be imported."""
    path, results, written = (tmp_path / name for name in ("list.toml", "r.json", "page.md"))
    path.write_text(LIST)
    files = ["--packages", str(path), "--results", str(results), "--page", str(written)]
    assert main(["--here", *files]) == 1  # one gave no report
    found = json.loads(results.read_text())["outcomes"]
    assert {name: x["result"] for name, x in found.items()} == {"nan 0": DIFFERS, "gone 0": SILENT}
    assert found["nan 0"]["counts"]["ok"] > 40
    assert "gone" in found["gone 0"]["findings"][0]
    assert "[attention \\| in NumPy](#numpy), `nan`" in written.read_text()
    # A run of some keeps the rows of the others, and says where the command is wrong.
    results.write_text(
        json.dumps({"outcomes": found | {"old 0": found["nan 0"] | {"name": "old"}}})
    )
    assert main(["gone", "--here", *files]) == 1
    assert list(json.loads(results.read_text())["outcomes"]) == ["nan 0", "gone 0"]
    with pytest.raises(SystemExit, match="2"):
        main(["missing", *files])
    assert "NAME: expected one of nan, gone" in capsys.readouterr().err


def test_what_cannot_be_installed_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    missing = Entry("x", "", "", "none", ("lvxattn-no-such-package==1.0",), "", "")
    with pytest.raises(NotInstallableError, match="lvxattn-no-such-package"):
        python_of(missing, tmp_path)
    # The folder is there, but not taken for an environment that is ready.
    folder = tmp_path / "environments" / "none"
    assert (folder / "bin" / "python").exists()
    assert not (folder / "made-of.json").exists()


def test_the_words_of_a_process_that_ended():
    assert last_words("a\nValueError: x\nb\n") == "ValueError: x"
    assert last_words("ValueError: x\ntorch.ChildFailedError: \nb\n") == "ValueError: x"
    aborted = "traceback : Signal 6 (SIGABRT) received by PID 3"
    assert last_words(f"torch.ChildFailedError: \n{aborted}\n====\n") == aborted
    assert last_words("a\nb\n\n") == "b"
    assert last_words("") == "it said nothing"


def test_no_process_outlives_its_time(tmp_path):
    child = tmp_path / "child"
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    done = run([sys.executable, "-c", program], os.environ, 5)
    assert (done.status, done.output) == (None, "started\n")
    ended = time.monotonic() + 10
    while _runs(int(child.read_text())) and time.monotonic() < ended:
        time.sleep(0.05)
    assert not _runs(int(child.read_text()))


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_functions_are_timed_in_turns():
    pytest.importorskip("torch")
    sizes = {"B": 1, "H": 2, "S_Q": 4, "S_KV": 8, "D": 4}
    functions = {"lv-xattn": ("ours:lv_xattn", (2,)), "gather": ("ours:gather", (4,))}
    work = {"rounds": 2, "functions": functions, "sizes": sizes}
    forward, both = measured(Path(sys.executable), 2, None, work, 300)
    assert (forward["pass"], [*forward["ratios"]]) == ("forward", ["gather"])
    assert (both["pass"], both["ratios"]) == ("forward and backward", {})  # none on 2 ranks
    assert (both["ranks"], both["network"], both["rounds"]) == (2, "shared memory", 2)
    assert forward["seconds"] > 0


def test_the_committed_page_is_that_of_the_committed_results():
    outcomes = json.loads(RESULTS.read_text())
    written = page([*outcomes["outcomes"].values()], outcomes.get("seconds"))
    assert PAGE.read_text() == written
    known = {entry.name for entry in entries()}
    assert {outcome["name"] for outcome in outcomes["outcomes"].values()} <= known
    assert PAGE.is_relative_to(ROOT)

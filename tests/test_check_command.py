"""The command line: output, exit statuses, and errors of usage."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from lvxattn.check import case_of, check, draw, suite_of
from lvxattn.check.cases import CASES
from lvxattn.check.command import main
from lvxattn.check.golden_data import read_tensors
from lvxattn.pytest_plugin import OPTIONS
from lvxattn.reference import full_attention
from tests.check_kernels import SOURCE
from tests.full_disk import full_disk
from tests.launch import PROGRAMS, ROOT, mpiexec
from tests.torch_ranks import forked

NAME = "kernels_of_command_tests"
COMMAND = (sys.executable, "-m", "lvxattn.check")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with kernels in it."""
    (tmp_path / f"{NAME}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_correct_function_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{NAME}:right", "--dtypes", "float32"]) == 0
    said = capsys.readouterr()
    count = len(suite_of("quick"))
    assert f"{count} of {count} passed" in said.out
    assert said.err == ""


def test_wrong_function_fails_and_json_is_complete(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"{NAME}:nan", "--dtypes", "float64,float32", "--seeds", "2", "--json", "found.json"]
    assert main([*line, "--quiet"]) == 1
    assert capsys.readouterr().out == ""
    found = json.loads((folder / "found.json").read_text())
    assert found["passed"] is False
    assert len(found["rows"]) == 4 * len(suite_of("quick"))
    assert {row["dtype"] for row in found["rows"]} == {"float64", "float32"}
    assert {row["seed"] for row in found["rows"]} == {0, 1}
    wrong = {row["case"] for row in found["rows"] if row["status"] == "wrong"}
    assert "dead-rows" in wrong
    assert "gaussian" not in wrong
    (said,) = {row["message"] for row in found["rows"] if row["case"] == "callable-mask"}
    assert said == "no callable masks"


def test_dash_means_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{NAME}:right", "--dtypes", "float32", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert not (folder / "-").exists()


def test_interrupt_prints_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lvxattn.check.command.checking.check", interrupt)
    assert main([f"{NAME}:right"]) == 130
    assert capsys.readouterr().err == "lvxattn check: interrupted\n"


@pytest.mark.parametrize(
    ("options", "judged"),
    [
        ([], {"out", "lse", "dq", "dk", "dv"}),
        (["--no-backward"], {"out", "lse"}),
    ],
)
def test_gradients_are_judged_by_default(options: list[str], judged: set[str]) -> None:
    line = [f"{NAME}:right", "--case", "gaussian", "--dtypes", "float32", "--json", "found.json"]
    assert main([*line, *options]) == 0
    (row,) = json.loads(Path("found.json").read_text())["rows"]
    assert {verdict["name"] for verdict in row["verdicts"]} == judged


def test_named_backward_is_judged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = [f"{NAME}:Kernels.right", "--case", "gaussian", "--dtypes", "float32", "--backward"]
    assert main([*line, f"{NAME}:back"]) == 0
    assert main([*line, f"{NAME}:wrong_back"]) == 1
    (text,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  wrong")]
    assert text == "  wrong"


BAD = {
    "no function": ([], "expected module:function"),
    "two functions": ([f"{NAME}:right", f"{NAME}:nan"], "unrecognized arguments"),
    "a file": ([f"{NAME}.py:right"], f"write {NAME}:right"),
    "a path": ([f"./{NAME}.py"], f"in ., write {NAME}:FUNCTION"),
    "a dot for a colon": ([f"{NAME}.right"], f"write {NAME}:right"),
    "no module": (["nowhere:right"], "no module 'nowhere'"),
    "no submodule": (["lvxattn.nowhere:right"], "no module 'lvxattn.nowhere'"),
    "no such name": ([f"{NAME}:rihgt"], "has no 'rihgt': did you mean right?"),
    "no such method": ([f"{NAME}:Kernels.rigth"], f"{NAME}:Kernels has no 'rigth'"),
    "no function of that name": ([f"{NAME}:number"], f"{NAME}:number is 3"),
    "a module that raises": (["broken:f"], "ZeroDivisionError: division by zero"),
    "where it raises": (["broken:f"], "broken.py:2)"),
    "a module with a mistake": (["misspelt:f"], "misspelt.py:3)"),
    "a module that lacks one": (["lacking:f"], "No module named 'nowhere'"),
    "a module that exits": (["leaving:f"], "leaving cannot be imported: SystemExit"),
    "no such backward": ([f"{NAME}:right", "--backward", "nowhere:f"], "--backward: no module"),
    "no such dtype": ([f"{NAME}:right", "--dtypes", "fp32"], "--dtypes: expected some of"),
    "no such suite": ([f"{NAME}:right", "--suite", "slow"], "--suite"),
    "no such framework": ([f"{NAME}:right", "--framework", "tf"], "--framework"),
    "no such device": ([f"{NAME}:right", "--device", "cuda"], "--device"),
    "no such case": (["--case", "easy"], "'easy'"),
    "no seeds": ([f"{NAME}:right", "--seeds", "0"], "--seeds"),
    "no time": ([f"{NAME}:right", "--time-limit", "0"], "--time-limit"),
    "a seed for all": ([f"{NAME}:right", "--seed", "1"], "--seed: goes with --case"),
    "a file for all": ([f"{NAME}:right", "--save", "x"], "--save: goes with --case"),
    "no such cut": ([f"{NAME}:right", "--cuts", "even,odd"], "--cuts: expected some of even, "),
    "cuts for one": ([f"{NAME}:right", "--cuts", "even"], "--cuts: goes with --distributed"),
    "seeds for one": (["--case", "gaussian", "--seeds", "2"], "--seeds: does not go with --case"),
    "several dtypes in one file": (["--case", "gaussian", "--save", "x"], "with one dtype"),
    "backward and none": (
        [f"{NAME}:right", "--no-backward", "--backward", f"{NAME}:back"],
        "--backward: does not go with --no-backward",
    ),
    "a report on nothing": (["--case", "gaussian", "--json", "x"], "--json: needs a function"),
    "no golden files": (["golden", "--verify", "nowhere"], "nowhere: no golden files"),
    "golden files twice": (["golden", "--out", "x", "--verify", "x"], "--verify"),
    "a seed to verify": (["golden", "--verify", "--seed", "1"], "--seed: goes with --out"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_usage_prints_one_line_and_exits_2(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    (folder / "misspelt.py").write_text("def f():\n    pass\ndef g(:\n")
    (folder / "lacking.py").write_text("import nowhere\n")
    (folder / "leaving.py").write_text("raise SystemExit(0)\n")
    argv, words = BAD[what]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.startswith("lvxattn check")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--json", "--save"])
def test_unwritable_file_is_refused_before_work(
    option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tells.py").write_text("def f(*_, **__):\n    raise SystemExit('called')\n")
    (folder / "kept").write_text("as it was")
    line = ["tells:f", "--case", "gaussian", "--dtypes", "float32", option]
    if option == "--json":  # the suite has it too
        line = ["tells:f", "--dtypes", "float32", option]
    assert main([*line, "nowhere/x"]) == 2
    assert main([*line, str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("cannot be written") == 2
    assert main(["tells:nothing", *line[1:], "kept"]) == 2
    assert (folder / "kept").read_text() == "as it was"


def test_full_disk_is_named_after_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "found.json").write_text("as it was")
    with full_disk(100):
        status = main([f"{NAME}:right", "--dtypes", "float32", "--json", "found.json"])
    said = capsys.readouterr()
    assert status == 2
    assert said.err == "lvxattn check: error: --json: found.json: File too large\n"
    assert "passed" in said.out
    assert (folder / "found.json").read_text() == "as it was"


def test_case_as_json_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [f"{NAME}:right", "--case", "gaussian", "--dtypes", "float32", "--json", "-"]
    assert main(line) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert not (folder / "-").exists()


def test_all_cases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert list(shown) == [case.name for case in suite_of("full") if case.quick] + [
        case.name for case in suite_of("full") if not case.quick
    ]
    for case in suite_of("full"):
        assert case.group in shown[case.name]
        assert shown[case.name].endswith(case.reason)
    assert "q 1x2x17x8 k 1x2x40x8 v 1x2x40x5" in shown["value-size"]
    assert lines[-1].startswith("--distributed: every pair of a number of ranks (1 to 8,")


def test_readme_lists_all_cases() -> None:
    page = (ROOT / "src" / "lvxattn" / "check" / "README.md").read_text()
    table = page.partition("| case | group |")[2].partition("\n\n")[0].splitlines()[2:]
    only = {True: "", False: " (full suite)"}
    rows = [f"| {case.name} | {case.group} | {case.reason}{only[case.quick]} |" for case in CASES]
    assert table == rows, "\n".join(rows)


def test_readme_names_all_options_and_arguments() -> None:
    page = (ROOT / "src" / "lvxattn" / "check" / "README.md").read_text()
    for name in set(OPTIONS) | {"impl", "xfails-file"}:
        assert f"--lvx-{name}" in page
    for name in set(signature(check).parameters) - {"fn"}:
        assert f"`{name}=`" in page
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", page):
        assert (ROOT / "src" / "lvxattn" / "check" / target).exists()


def test_single_case_is_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--case", "dead-rows", "--seed", "3", "--dtypes", "float32"]
    assert main([f"{NAME}:nan", *line]) == 1
    said = capsys.readouterr().out
    assert "dead-rows, float32, seed 3" in said
    (told,) = [row for row in said.splitlines() if row.startswith("  out ")]
    assert "worst at (0, 0, 1, 0): got nan, expected 0" in told
    assert main([f"{NAME}:right", *line]) == 0
    rows = [row.split()[0] for row in capsys.readouterr().out.splitlines() if "worst at" in row]
    assert rows == ["out", "lse", "dq", "dk", "dv"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_saved_case_has_inputs_truth_and_results(dtype: str) -> None:
    line = ["--case", "callable-mask", "--seed", "2", "--dtypes", dtype, "--save", "x.safetensors"]
    assert main([f"{NAME}:right", *line, "--quiet"]) == 0
    x = read_tensors("x.safetensors")
    problem = draw(case_of("callable-mask"), dtype, 2)
    for name in ("q", "k", "v", "dout"):
        assert x[name].dtype.name == dtype
        assert (x[name] == getattr(problem, name)).all()
    out, lse = full_attention(
        *(x[name].astype(np.float64) for name in "qkv"), scale=problem.scale, mask=x["mask"]
    )
    assert (x["out"] == out).all()
    assert (x["lse"] == lse).all()
    assert (x["got_out"] == out.astype(x["q"].dtype)).all()
    assert {"dq", "dk", "dv", "got_lse"} <= set(x)
    with safe_open("x.safetensors", "numpy") as file:  # type: ignore[no-untyped-call]
        notes = file.metadata()
    assert (notes["case"], notes["seed"], notes["dtype"]) == ("callable-mask", "2", dtype)
    assert float(notes["scale"]) == problem.scale
    assert "kv_index // frame % 2" in notes["mask"]


def test_a_case_needs_no_function(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--case", "one-key", "--dtypes", "float32", "--save", "x.safetensors"]
    assert main(line) == 0
    assert "one-key, float32, seed 0" in capsys.readouterr().out
    assert set(read_tensors("x.safetensors")) == {
        *("q", "k", "v", "dout"),
        *("out", "lse", "dq", "dk", "dv"),
    }


@pytest.mark.parametrize("passed", [True, False])
def test_self_test_sets_exit_status(
    passed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    class Found(SimpleNamespace):
        def __str__(self) -> str:
            return "the matrix"

    def self_test(**options: Any) -> Found:
        asked.append(options)
        return Found(passed=passed)

    monkeypatch.setattr("lvxattn.check.command.entry.self_test", self_test)
    assert main(["self-test", "--seeds", "7"]) == (0 if passed else 1)
    assert asked == [{"seeds": 7, "path": None}]
    assert "the matrix" in capsys.readouterr().out


def test_command_exits_with_status(folder: Path) -> None:
    line = [f"{NAME}:nan", "--case", "dead-rows", "--dtypes", "float32", "--quiet"]
    done = subprocess.run([*COMMAND, *line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_command_survives_closed_pipe() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "--list"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("launch", "what", "status", "out", "err"),
    [
        (mpiexec, "passed", 0, "the report", ""),
        (mpiexec, "failed", 1, "the report", ""),
        (mpiexec, "no module on the last rank", 2, "", "no module"),
        (forked, "failed", 1, "the report", ""),
    ],
)
def test_ranks_exit_alike_and_one_prints(
    launch: Any, what: str, status: int, out: str, err: str
) -> None:
    ended = launch(2, PROGRAMS / "check_command.py", what)
    statuses = [line for line in ended.out.splitlines() if line.startswith("status")]
    assert statuses == [f"status {status}"] * 2
    assert ended.out.count("the report") == bool(out)
    if launch is mpiexec:  # torchrun has its own words for a status that is not 0
        assert ended.err.count(err) == 1 if err else not ended.err
    assert ended.status == status


@pytest.mark.mpi
@pytest.mark.parametrize(("rank", "err"), [("0", "started 4 processes (PMI_SIZE)"), ("2", "")])
def test_ranks_without_communicator_are_refused(
    rank: str, err: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", rank)
    assert main([f"{NAME}:right", "--distributed"]) == 2
    said = capsys.readouterr()
    assert (err in said.err, bool(said.err), said.out) == (True, rank == "0", "")

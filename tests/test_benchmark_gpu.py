"""The GPU run, rehearsed without a GPU: every part runs; a failing step does not end the run."""

import json
import os
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.launch import ROOT, Ended, launch

FOLDER = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Return the modules of the folder, which are importable only from there."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ("examine", "judge", "process", "steps", "store", "table")
    found = {name: import_module(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return found


def test_all_benchmarks_run_without_a_device(gpu: dict[str, ModuleType], tmp_path: Path) -> None:
    """In one process: importing PyTorch takes longer than all benchmarks."""
    program = (
        "import sys, part\n"
        "for name in part.PARTS:\n"
        f"    sys.argv[1:] = [name, '--cpu', '--json', {str(tmp_path)!r} + f'/{{name}}.json']\n"
        "    part.main()\n"
        "import local, timing, torch\n"
        "x = local.Inputs.of(timing.Device('cpu'), torch.float32, 2, 1, 5, 9, 8)\n"
        "assert local.farthest([x.out], x) < 1e-6\n"
        "x.out[0, 1, 3] *= 1.5\n"  # one row of many
        "assert 0.2 < local.farthest([x.out], x) < 0.6\n"
    )
    ended = launch(
        [sys.executable, "-W", "error", "-c", program],
        timeout=100,
        env={"PYTHONPATH": os.pathsep.join(map(str, (FOLDER, ROOT / "src")))},
    )
    assert ended.status == 0, ended.err
    measured = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    steps = gpu["steps"].parts(tmp_path, dry=True)
    assert set(measured) == {step.part for step in steps}
    for row in measured["local"]:
        assert set(row["failed"]) == {"sdpa cudnn", "sdpa efficient"}
        assert row["seconds"]["blocked"] > 0 < row["sdpa seconds"]["sdpa math"]
    assert any("split blocked 66" in row["seconds"] for row in measured["local"])
    for part in ("local", "cupy"):
        assert all(row["off by"] > 0 for row in measured[part])
        assert gpu["judge"].wrong(part, measured[part]) == []
    for row in measured["cupy"]:
        assert row["dtype"] == "bfloat16"
        assert set(row["failed"]) == {"sdpa cudnn", "sdpa efficient"}
        assert set(row["seconds"]) == {"auto", "tiles"}
    for row in measured["errors"]:
        # Blocked products in bf16 round p and ds, too; three roundings at once are 1.8 of one.
        assert all(0.9 < ratio < 3 for ratio in row["over the floor"].values())
    assert all(row["differs by"]["operators"] == 0 for row in measured["merging"])
    text = gpu["table"].page(stored(parts=measured))
    assert "Not measured" not in text
    assert "| forward | bfloat16 | 8 | 1100 | blocked |" in text


def test_report_of_no_results(gpu: dict[str, ModuleType]) -> None:
    assert gpu["table"].page(stored(parts={})).count("Not measured") == 6


def stored(parts: Any) -> dict[str, Any]:
    row = {"name": "a step", "outcome": "ok", "seconds": 1.0, "last": "1 | 2"}
    return {
        "device": "x", "rehearsal": True, "found": {"torch": "2"}, "missing": {"cupy": "none"},
        "steps": [row], "parts": parts,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("program", "limit", "needs", "outcome", "last"),
    [
        ("print('first'); print('last')", 20, (), "ok", "last"),
        ("print('said'); raise SystemExit(3)", 20, (), "FAILED (3)", "said"),
        ("import os; os.abort()", 20, (), "FAILED (-6)", ""),
        ("import time; print('began', flush=True); time.sleep(100)", 3, (), "OUT OF TIME", "began"),
        ("print('never')", 20, ("cupy",), "not run: no cupy", ""),
    ],
)
def test_step_ends_within_its_time_limit(
    gpu: dict[str, ModuleType], program: str, limit: float, needs: Any, outcome: str, last: str
) -> None:
    machine = gpu["examine"].Machine(dict(os.environ), missing={"cupy": "none"})
    command = [sys.executable, "-c", program]
    step = gpu["steps"].Step("a step", command, limit, needs)
    row = gpu["steps"].perform(step, machine, 500)
    assert (row["outcome"], row["last"]) == (outcome, last)
    assert row["seconds"] < 40


def test_step_without_time_left_is_skipped(gpu: dict[str, ModuleType]) -> None:
    machine = gpu["examine"].Machine(dict(os.environ))
    step = gpu["steps"].Step("a step", [sys.executable, "-c", ""], 60, ())
    assert gpu["steps"].perform(step, machine, 3)["outcome"] == "not run: no time left"


def test_all_gpu_tests_are_steps_and_fit(gpu: dict[str, ModuleType]) -> None:
    machine = gpu["examine"].Machine({}, launcher=["mpirun", "-x", "A"])
    checks = gpu["steps"].checks(machine, dry=False)
    names = {step.name for step in checks}
    assert {"tests test_torch_gpu.py", "tests test_cupy_ranks_gpu.py"} <= names
    assert any(step.command[:4] == ["mpirun", "-x", "A", "-n"] for step in checks)
    parts = gpu["steps"].parts(Path("x"), dry=False)
    # Neither the steps before nor one benchmark can use up the time of the benchmarks.
    assert gpu["steps"].ALL <= 540
    assert max(step.limit for step in parts) < gpu["steps"].ALL - gpu["steps"].CHECKS
    needs = {need for step in [*checks, *parts] for need in step.needs}
    assert needs <= {*gpu["examine"].PROBES, "mpi"}


def test_missing_packages_are_named(gpu: dict[str, ModuleType], tmp_path: Path) -> None:
    machine = gpu["examine"].Machine(dict(os.environ))
    examine = gpu["examine"]
    assert not examine.note(machine, "x", [sys.executable, "-c", "import no_such"], "a package")
    assert machine.missing["x"] == "a package: ModuleNotFoundError: No module named 'no_such'"
    assert not examine.note(machine, "y", [str(tmp_path / "no such")], "a program")
    assert "a program: [Errno 2]" in machine.missing["y"]
    with pytest.raises(ValueError, match=r"CUDA_MPI: expected what build_cuda_mpi.sh made"):
        examine.carried(tmp_path, tmp_path, {})


def test_cuda_mpi_sets_environment_and_launcher(gpu: dict[str, ModuleType], tmp_path: Path) -> None:
    mpirun = tmp_path / "a folder" / "ompi" / "bin" / "mpirun"
    mpirun.parent.mkdir(parents=True)
    mpirun.write_text("#!/bin/sh\n")
    mpirun.chmod(0o755)
    (tmp_path / "a folder" / "env.sh").write_text(
        f'export PATH="{mpirun.parent}:$PATH" CUDA_MPI_FLAGS="--mca pml ucx" LIBRARY=here\n'
    )
    env, launcher = gpu["examine"].carried(tmp_path / "a folder", tmp_path, dict(os.environ))
    assert env["LIBRARY"] == "here"
    assert launcher == [str(mpirun), "--mca", "pml", "ucx"]


# A run of `make gpu`, with given programs as its steps.
RUN = """
import json, os, runpy, sys
sys.path.insert(0, FOLDER)
import examine, steps
found = {"torch": "2", "driver": "NVIDIA X 1, 580"}
examine.examine = lambda *_: examine.Machine(dict(os.environ), found=found)
steps.steps = lambda machine, scratch, dry: [
    steps.Step(name, [sys.executable, "-c", program, str(scratch)], 20, (), part=part)
    for name, program, part in STEPS
]
runpy.run_path(FOLDER, run_name="__main__")
"""
WRITE_CUPY = "import sys; open(sys.argv[1] + '/cupy.json', 'w').write({!r})"


def run_gpu(out: Path, steps: list[tuple[str, str, str]], *args: str) -> Ended:
    (out.parent / "scratch").mkdir()
    program = f"FOLDER, STEPS = {str(FOLDER)!r}, {steps!r}\n{RUN}"
    return launch(
        [sys.executable, "-c", program, "--out", str(out), *args],
        timeout=100,
        env={"TMPDIR": str(out.parent / "scratch")},
    )


def cupy_row(**changed: Any) -> dict[str, Any]:
    return {
        "dtype": "bfloat16", "H": 32, "s_q": 64, "s_kv": 75_000, "pass": "forward", "flop": 1,
        "bytes": 1, "seconds": {"auto": 1.0}, "auto": "auto", "failed": {}, "off by": 4e-3,
        "sdpa seconds": {"sdpa flash": 1.0, "sdpa cudnn": 2.0},
    } | changed  # fmt: skip


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_no_process_and_keeps_old_results(
    tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "gpu-x-1.json").write_text("complete")
    rows = json.dumps([cupy_row()])
    cut = f"{WRITE_CUPY.format(rows)}; import os, subprocess, time\n"
    # A rank in a session of its own, which holds the output and ignores SIGTERM.
    cut += "subprocess.Popen(['sh', '-c', 'trap : TERM; sleep 100'], start_new_session=True)\n"
    cut += f"os.kill(os.getppid(), {int(number)}); time.sleep(100)"
    ended = run_gpu(out, [("one", "print(1)", ""), ("two", cut, "cupy"), ("three", "", "")])
    assert ended.status == 128 + number, ended.err
    assert not ended.left
    assert "Traceback" not in ended.err
    assert ended.seconds < 40
    assert not list((tmp_path / "scratch").iterdir())
    assert (out / "gpu-x-1.json").read_text() == "complete"
    (unfinished,) = out.glob("gpu-x-1.unfinished-*.json")
    stored = json.loads(unfinished.read_text())
    assert [row["outcome"] for row in stored["steps"]] == ["ok", "INTERRUPTED"]
    assert stored["parts"]["cupy"] == [cupy_row()]
    assert "INTERRUPTED" in ended.out.partition("All steps:")[2]


def test_complete_run_replaces_results_and_wrong_results_fail(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "gpu-x-1.json").write_text("complete")
    rows = json.dumps([cupy_row(), cupy_row(**{"off by": float("nan")})])
    wrong = "benchmark cupy", WRITE_CUPY.format(rows), "cupy"
    unreadable = "benchmark errors", WRITE_CUPY.format("[{}]").replace("/cupy", "/errors"), "errors"
    ended = run_gpu(out, [wrong, unreadable, ("last", "print(1)", "")])
    assert ended.status == 1, ended.err
    assert {file.name for file in out.iterdir()} == {"gpu-x-1.json", "gpu-x-1.md"}
    stored = json.loads((out / "gpu-x-1.json").read_text())
    outcomes = ["FAILED (wrong result)", "FAILED (wrong result)", "ok"]
    assert [row["outcome"] for row in stored["steps"]] == outcomes
    assert "off by nan, at most 1.6e-02" in stored["steps"][0]["last"]
    assert "cannot be judged" in stored["steps"][1]["last"]


def test_unwritable_results_are_printed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    remove = f"import shutil; shutil.rmtree({str(out)!r})"
    rows = json.dumps([cupy_row()])
    measured = "benchmark cupy", WRITE_CUPY.format(rows), "cupy"
    ended = run_gpu(out, [("one", remove, ""), measured])
    assert ended.status == 1, ended.err
    assert "RESULTS COULD NOT BE WRITTEN" in ended.out
    assert "| benchmark cupy | ok |" in ended.out


def test_run_without_time_keeps_old_results(tmp_path: Path) -> None:
    ended = run_gpu(tmp_path / "out", [("one", "print(1)", "")], "--seconds", "1")
    assert ended.status == 2, ended.err
    assert all(".unfinished-" in file.name for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seconds", "0"], "expected more than 0 seconds, got 0"),
        (["--seconds", "nan"], "nan"),
        (["--mpiexec", "a", "--cuda-mpi", "b"], "not allowed with"),
        (["--out", __file__], "expected a folder with room for results"),
        (["--out", "/proc"], "/proc"),
    ],
)
def test_bad_arguments_raise_before_any_step(tmp_path: Path, args: list[str], message: str) -> None:
    ended = run_gpu(tmp_path / "out", [("one", "print(1)", "")], *args)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_timed_out_step_is_killed_with_its_children_and_its_output_kept() -> None:
    step = (
        "import subprocess, time\n"
        "subprocess.Popen(['sh', '-c', 'trap : TERM; sleep 100'], start_new_session=True)\n"
        "print('began', flush=True); time.sleep(100)\n"
    )
    program = f"import os, process, sys; command = [sys.executable, '-c', {step!r}]\n"
    program += "print(process.run(command, dict(os.environ), 3))"
    path = os.pathsep.join(map(str, (FOLDER, ROOT / "src")))
    ended = launch([sys.executable, "-c", program], timeout=100, env={"PYTHONPATH": path})
    assert ended.out.strip() == r"Ended(status=None, out='began\n', err='')", ended.err
    assert not ended.left
    assert ended.seconds < 40


@pytest.mark.parametrize(
    ("rows", "verdict", "worst"),
    [
        ([cupy_row()], "met", 1.0),
        ([cupy_row(), cupy_row(seconds={"auto": 2.0})], "MISSED", 0.5),
        ([cupy_row(), cupy_row(seconds={"auto": float("nan")})], "MISSED", float("nan")),
        ([cupy_row(), cupy_row(seconds={})], "MISSED", float("nan")),
        ([cupy_row(**{"sdpa seconds": {}})], "not measured", None),
        ([], "not measured", None),
    ],
)
def test_goal_is_judged_by_its_worst_row(
    gpu: dict[str, ModuleType], rows: Any, verdict: str, worst: float | None
) -> None:
    steps = [{"name": "benchmark cupy", "outcome": "ok", "seconds": 1.0, "last": ""}]
    kept = stored(parts={"cupy": rows}) | {"rehearsal": False, "steps": steps}
    found = {row["what"]: row for row in gpu["judge"].verdicts(kept)}
    goal = found["mpi_impl on CuPy: SDPA's best over ours, in time"]
    assert (goal["verdict"], goal["worst"]) == (verdict, pytest.approx(worst, nan_ok=True))
    steps[0]["outcome"] = "OUT OF TIME"
    again = {row["what"]: row["verdict"] for row in gpu["judge"].verdicts(kept)}
    assert again[goal["what"]] == (verdict if verdict == "not measured" else f"{verdict} so far")
    assert "FAILED" in gpu["table"].page(kept) or all(row["seconds"] for row in rows)


def test_result_fails_beyond_its_rounding_error(gpu: dict[str, ModuleType]) -> None:
    wrong, nan = gpu["judge"].wrong, float("nan")
    # Two unrelated random results differ by hundreds of limits.
    assert not wrong("cupy", [cupy_row()])
    assert wrong("cupy", [cupy_row(**{"off by": 2e-2})])
    assert wrong("cupy", [cupy_row(**{"off by": nan})])
    errors = {"dtype": "float16", "shards": 2}
    assert not wrong("errors", [errors | {"over the floor": {"out": 2.5}}])
    assert wrong("errors", [errors | {"over the floor": {"out": 1.0, "dq": nan}}])
    assert wrong("errors", [errors | {"over the floor": {"out": 1.0, "dq": 5.0}}])
    assert not wrong("merging", [{"s_q": 64, "differs by": {"triton": 1e-6}}])
    assert wrong("merging", [{"s_q": 64, "differs by": {"triton": 1e-3}}])


def test_first_working_launcher_is_chosen(gpu: dict[str, ModuleType], tmp_path: Path) -> None:
    box, alone, good = (tmp_path / name for name in ("box", "alone", "good"))
    box.write_text("#!/bin/sh\nprintf -- '-----\\nno slots\\n-----\\n' >&2; exit 1\n")
    alone.write_text("#!/bin/sh\necho 'answer: 1 Open MPI v5'\n")
    good.write_text("#!/bin/sh\necho 'answer: 2 Open MPI v5'\n")
    for file in (box, alone, good):
        file.chmod(0o755)
    bad = [[str(box), "--flag"], [str(alone)], ["/no such"]]
    machine = gpu["examine"].Machine(dict(os.environ))
    gpu["examine"].find_mpi(machine, bad)
    assert machine.missing["mpi"] == (
        f"two ranks by {box}: no slots; {alone} starts ranks that are each alone, of Open MPI v5; "
        "two ranks by /no such: [Errno 2] No such file or directory: '/no such'"
    )
    assert not machine.launcher
    gpu["examine"].find_mpi(machine, [*bad, [str(good), "-x", "A"]])
    assert machine.launcher == [str(good), "-x", "A"]
    assert machine.found["mpi"] == f"Open MPI v5, started by {good}"
    assert "mpi" not in machine.missing


def test_cuda_mpi_is_preferred(gpu: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "mpirun").write_text("#!/bin/sh\n")
    (tmp_path / "mpirun").chmod(0o755)
    env = {"PATH": str(tmp_path), "CUDA_MPI_FLAGS": "--mca pml ucx"}
    found = list(gpu["examine"].launchers(env))
    assert found[0] == [str(tmp_path / "mpirun"), "--mca", "pml", "ucx"]
    assert [str(Path(sys.executable).with_name("mpiexec"))] in found
    named = env | {"LVXATTN_MPIEXEC": "srun --mpi=pmix"}
    assert list(gpu["examine"].launchers(named)) == [["srun", "--mpi=pmix"]]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "there is no"),
        ("damaged", "cannot be unpacked"),
        ("echo gone wrong >&2; false", "fails: gone wrong"),
        ("export A=1", "it sets no CUDA_MPI_FLAGS"),
        ("export CUDA_MPI_FLAGS=''", "found no mpirun"),
    ],
)
def test_unusable_cuda_mpi_raises(
    gpu: dict[str, ModuleType], tmp_path: Path, script: str | None, why: str
) -> None:
    carried = tmp_path / "mpi"
    if script == "damaged":
        (tmp_path / "x").write_bytes(bytes(range(256)) * 99)
        whole = shutil.make_archive(str(tmp_path / "whole"), "gztar", tmp_path, "x")
        carried.write_bytes(Path(whole).read_bytes()[:-20])
    elif script:
        carried.mkdir()
        (carried / "env.sh").write_text(script)
    with pytest.raises(ValueError, match=f"CUDA_MPI: .*{why}"):
        gpu["examine"].carried(carried, tmp_path, dict(os.environ))


def test_rehearsal_needs_packages_but_no_device(gpu: dict[str, ModuleType]) -> None:
    examine, steps = gpu["examine"], gpu["steps"]
    machine = examine.Machine(dict(os.environ))
    program = "print('2.1', flush=True); assert False, 'it finds no device'"
    assert not examine.note(machine, "torch", [sys.executable, "-c", program], "PyTorch")
    assert machine.missing["torch"] == "PyTorch: AssertionError: it finds no device"
    step = steps.Step("a step", [sys.executable, "-c", ""], 9, ("torch",))
    assert steps.perform(step, machine, 9)["outcome"] == "not run: no torch"
    assert steps.perform(step, machine, 9, dry=True)["outcome"] == "ok"
    step.needs = "torch", "pytest"
    assert not examine.note(machine, "pytest", [sys.executable, "-c", "import no_such"], "pytest")
    assert steps.perform(step, machine, 9, dry=True)["outcome"] == "not run: no pytest"
    dry = steps.steps(machine, Path("x"), dry=True)
    assert all("cupy" not in step.needs for step in dry)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_gpu_passes_its_variables_on(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\n[ $1 = -V ] && echo Python 3.9.1\nexit 1\n")
    old.chmod(0o755)
    refused = launch(["make", "-C", str(ROOT), "gpu", f"PYTHON={old}"], timeout=100)
    assert refused.status == 2
    assert f"Python 3.11 or newer is required, and {old} is Python 3.9.1." in refused.err
    for given, wanted in {
        ("DRY=1", "MPIEXEC=mpi run"): "benchmarks/gpu --dry --mpiexec 'mpi run'",
        ("DRY=0", "OUT=a b"): "benchmarks/gpu --out 'a b'",
        ("MPI=system", "DRY="): "benchmarks/gpu --mpiexec 'mpiexec'",
    }.items():
        command = ["make", "-n", "-C", str(ROOT), "gpu", *given]
        printed = launch(command, timeout=100, env=dict.fromkeys(("MAKEFLAGS", "ARGS"))).out
        command = printed.replace("\\\n", " ").partition("benchmarks/gpu")[1:]
        assert "".join(command).split("\n")[0].split() == wanted.split()

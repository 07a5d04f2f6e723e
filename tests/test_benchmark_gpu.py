"""The GPU run can be rehearsed without one: every part runs, and no step's failure ends the run."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.launch import ROOT, launch

FOLDER = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Return the modules of the folder, which are imported from there alone."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ("examine", "judge", "process", "steps", "store", "table")
    found = {name: import_module(name) for name in names}
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return found


def test_every_part_of_the_benchmarks_runs_without_a_device(
    gpu: dict[str, ModuleType], tmp_path: Path
) -> None:
    """All in one process: to import PyTorch takes longer than all of them."""
    program = (
        "import sys, part\n"
        "for name in part.PARTS:\n"
        f"    sys.argv[1:] = [name, '--cpu', '--json', {str(tmp_path)!r} + f'/{{name}}.json']\n"
        "    part.main()\n"
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
    assert any("split blocked 33" in row["seconds"] for row in measured["local"])
    assert all(row["off by"] < 2**-10 for row in measured["cupy"])
    for row in measured["errors"]:
        # Blocked products in bf16 round p and ds, too; three roundings at once are 1.8 of one.
        assert all(0.9 < ratio < 3 for ratio in row["over the floor"].values())
    assert all(row["differs by"]["operators"] == 0 for row in measured["merging"])
    text = gpu["table"].page(stored(parts=measured))
    assert "Not measured" not in text
    assert "| forward | bfloat16 | 8 | 1100 | blocked |" in text


def test_a_page_is_written_of_nothing(gpu: dict[str, ModuleType]) -> None:
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
        ("import time; print('began', flush=True); time.sleep(60)", 1, (), "OUT OF TIME", "began"),
        ("print('never')", 20, ("cupy",), "not run: no cupy", ""),
    ],
)
def test_a_step_ends_in_its_time_and_says_how(
    gpu: dict[str, ModuleType], program: str, limit: float, needs: Any, outcome: str, last: str
) -> None:
    machine = gpu["examine"].Machine(dict(os.environ), missing={"cupy": "none"})
    command = [sys.executable, "-c", program]
    step = gpu["steps"].Step("a step", command, limit, needs)
    row = gpu["steps"].perform(step, machine, 500)
    assert (row["outcome"], row["last"]) == (outcome, last)
    assert row["seconds"] < 10


def test_a_step_that_has_no_time_left_is_not_run(gpu: dict[str, ModuleType]) -> None:
    machine = gpu["examine"].Machine(dict(os.environ))
    step = gpu["steps"].Step("a step", [sys.executable, "-c", ""], 60, ())
    assert gpu["steps"].perform(step, machine, 3)["outcome"] == "not run: no time left"


def test_all_gpu_tests_are_run_and_every_step_fits(gpu: dict[str, ModuleType]) -> None:
    machine = gpu["examine"].Machine({}, launcher=["mpirun", "-x", "A"])
    checks = gpu["steps"].checks(machine, dry=False)
    names = {step.name for step in checks}
    assert {"tests test_torch_gpu.py", "tests test_cupy_ranks_gpu.py"} <= names
    assert any(step.command[:4] == ["mpirun", "-x", "A", "-n"] for step in checks)
    parts = gpu["steps"].parts(Path("x"), dry=False)
    # What comes before cannot take the time of the benchmarks, nor one of them that of all.
    assert gpu["steps"].ALL <= 540
    assert max(step.limit for step in parts) < gpu["steps"].ALL - gpu["steps"].CHECKS
    needs = {need for step in [*checks, *parts] for need in step.needs}
    assert needs <= {*gpu["examine"].PROBES, "mpi"}


def test_packages_that_are_missing_are_named(gpu: dict[str, ModuleType], tmp_path: Path) -> None:
    machine = gpu["examine"].Machine(dict(os.environ))
    examine = gpu["examine"]
    assert not examine.note(machine, "x", [sys.executable, "-c", "import no_such"], "a package")
    assert machine.missing["x"] == "a package: ModuleNotFoundError: No module named 'no_such'"
    assert not examine.note(machine, "y", [str(tmp_path / "no such")], "a program")
    assert "a program: [Errno 2]" in machine.missing["y"]
    with pytest.raises(ValueError, match=r"CUDA_MPI: expected what build_cuda_mpi.sh made"):
        examine.carried(tmp_path, tmp_path, {})


def test_a_carried_mpi_brings_its_environment_and_its_launcher(
    gpu: dict[str, ModuleType], tmp_path: Path
) -> None:
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

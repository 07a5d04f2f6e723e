"""The scripts of examples/cluster: pages show them as they are; images are made as README says.

`test_slurm` runs them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT

EXAMPLES = ROOT / "examples" / "cluster"
SCRIPTS = sorted(EXAMPLES.glob("*.sbatch"))
PAGE = (ROOT / "docs" / "clusters.md").read_text()
README = (ROOT / "README.md").read_text()
IMAGES = ["Dockerfile", "lvxattn.def"]


def test_pages_show_the_scripts_as_they_are() -> None:
    shown = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)
    assert sorted(shown) == sorted(script.read_text() for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_slurm_read_all_of_a_script(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    lines = script.read_text().splitlines()
    # Slurm ignores options after the first command.
    options = [n for n, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert options == [*range(1, 1 + len(options))]


@pytest.mark.parametrize("name", IMAGES)
def test_image_is_made_by_the_commands_of_the_readme(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    usage, commands = [], []
    for line in text.splitlines():
        (usage if line.startswith("#") else commands).append(line)
    code = "\n".join(commands)
    version = re.search(r"(?i:from):? python:(3\.\d+)-", code)
    assert version is not None
    assert f"Python {version[1]} or newer and `make`" in README
    assert re.search(r"install --yes --no-install-recommends make\b", code)
    targets = re.findall(r'\bmake"?,? "?([a-z-]+)', code.replace("recommends make", ""))
    assert "setup" in targets
    for target in targets:
        assert re.search(rf"(\$ |`)make {target}\b", README), target
    # `make setup` puts mpiexec there, and ranks are started as README says.
    assert "/.venv/bin:$PATH" in code
    assert ".venv/bin/mpiexec" in README
    assert "python -m mpi4py -m lvxattn.mpi_impl run --check" in "\n".join(usage)
    assert "python -m mpi4py" in README
    for file in re.findall(r"examples/cluster/\S+", "\n".join(usage)):
        assert (ROOT / file).exists()


def test_images_are_made_alike() -> None:
    docker, apptainer = ((EXAMPLES / name).read_text() for name in IMAGES)
    for pattern in r"python:3\S+", r"apt-get [\w -]*\w", r"make setup", r"git archive .*":
        assert re.findall(pattern, docker) == re.findall(pattern, apptainer)


def test_table_is_sorted_and_says_what_failed(tmp_path: Path) -> None:
    (tmp_path / "sizes").mkdir()
    sizes = 1024, 65536, 4096, 512
    for keys in sizes:
        totals = {"keys": keys, "ranks": 4, "hosts": 2, "forward": 0.0015, "bytes": 2_000_000}
        checks = [{"passed": True}, {"passed": keys != 512}] if keys != 4096 else []
        run = {"totals": totals, "checks": checks}
        (tmp_path / "sizes" / f"{keys}.json").write_text(json.dumps(run))
    said = {512: "FAILED", 4096: "not checked"}
    assert make_table(tmp_path).stdout.splitlines()[2:] == [
        f"| {keys:,} | 4 | 2 | 1.5 | 2.00 | {said.get(keys, 'passed')} |" for keys in sorted(sizes)
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"totals": {}}', '{"totals": 1, "checks": []}'])
def test_damaged_result_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "64.json").write_text(text)
    done = make_table(tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"table\.py: sizes/64\.json: expected what run .*\n", done.stderr)


def test_table_of_nothing_is_refused_in_one_line(tmp_path: Path) -> None:
    done = make_table(tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"table\.py: expected sizes/\*\.json, found none: .*\n", done.stderr)


def make_table(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run table.py in a folder."""
    command = [sys.executable, EXAMPLES / "table.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)

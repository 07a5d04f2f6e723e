"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, mpiexec

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.mpi
def test_the_ten_lines_for_a_cluster_run_as_shown(tmp_path: Path) -> None:
    (program,) = [block for block in BLOCKS if "mpiexec" in block]
    checks = """
assert out.shape == (1, 32, 16, 64) and lse.shape == (1, 32, 16)
assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
assert abs(dv).max() > 0
print("done")
"""
    (tmp_path / "example.py").write_text(program + checks)
    ended = mpiexec(4, tmp_path / "example.py")
    assert (ended.status, ended.out.count("done")) == (0, 4), ended.err


def test_the_oracle_runs_as_shown(tmp_path: Path) -> None:
    (program,) = [block for block in BLOCKS if "run_ranks" in block]
    (tmp_path / "oracle.py").write_text(program)
    subprocess.run([sys.executable, tmp_path / "oracle.py"], check=True, timeout=60)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()

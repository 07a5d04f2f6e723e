"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, mpiexec
from tests.torch_ranks import forked

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.mpi
def test_mpi_example_runs(tmp_path: Path) -> None:
    (program,) = [block for block in BLOCKS if "run as: mpiexec" in block]
    checks = """
assert out.shape == (1, 32, 16, 64) and lse.shape == (1, 32, 16)
assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
assert abs(dv).max() > 0
print("done")
"""
    (tmp_path / "example.py").write_text(program + checks)
    ended = mpiexec(4, tmp_path / "example.py")
    assert (ended.status, ended.out.count("done")) == (0, 4), ended.err


@pytest.mark.mpi
def test_training_example_runs(tmp_path: Path) -> None:
    (program,) = [block for block in BLOCKS if "run as: torchrun" in block]
    before = "optimizer.zero_grad()"
    shown = [
        "import sys",
        "whole = loss.detach().clone()",
        "dist.all_reduce(whole)",
        'sys.stdout.write(f"step {step} loss {float(whole)}" + chr(10))',  # ranks share a pipe
    ]
    program = program.replace(before, "; ".join([*shown, before]))
    end = "dist.destroy_process_group()"
    weights = "sum(float(p.detach().double().abs().sum()) for p in layers.parameters())"
    shown = ["\n", f'sys.stdout.write(f"weights {{{weights}}}" + chr(10))', "\n", end]
    (tmp_path / "train.py").write_text(program.replace(end, "".join(shown)))
    ended = forked(2, tmp_path / "train.py")
    assert ended.status == 0, ended.err
    found = re.findall(r"^step (\d) loss (\S+)$", ended.out, re.MULTILINE)
    losses = [{float(loss) for at, loss in found if int(at) == step} for step in range(3)]
    assert len(found) == 6
    assert all(len(loss) == 1 for loss in losses)  # the same whole loss on both ranks
    assert max(losses[0]) > max(losses[1]) > max(losses[2])
    weights = re.findall(r"^weights (\S+)$", ended.out, re.MULTILINE)
    assert len(weights) == 2
    assert weights[0] == weights[1]  # ranks that are alike in the end


def test_oracle_example_runs(tmp_path: Path) -> None:
    (program,) = [block for block in BLOCKS if "run_ranks" in block]
    (tmp_path / "oracle.py").write_text(program)
    subprocess.run([sys.executable, tmp_path / "oracle.py"], check=True, timeout=60)


def test_report_example_is_current(tmp_path: Path) -> None:
    (program,) = [block for block in BLOCKS if "import check" in block]
    (shown,) = re.findall(r"```text\n(LV-XAttn check.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(program)
    done = subprocess.run(
        [sys.executable, tmp_path / "mine.py"],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )

    def two_digits(line: str) -> str:  # the others are this machine's, and all of those that pass
        line = re.sub(r" 0\.\d\d$", "", line)
        return re.sub(r"\d+\.\d+(e[-+]\d+)?", lambda x: f"{float(x[0]):.2g}", line)

    printed = [two_digits(line) for line in done.stdout.splitlines()]
    for line in shown.splitlines():
        found = any(text.startswith(two_digits(line)) for text in printed)
        assert found or line == "  ...", f"{line}\n{done.stdout}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_resolve(target: str) -> None:
    assert (ROOT / target).exists()

"""Ranks of a notebook: they print and give, their errors and ends are named, none is left."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import gone, until
from tutorials import torch_cell
from tutorials.torch_cell import RanksError, run

pytest.importorskip("torch")
pytest.importorskip("transformers")

SLEEPS = "import time\ntime.sleep(60)"
FAILED = {
    "import torch.distributed as dist\nif dist.get_rank(): 1 / 0\ndist.barrier()":
        r"^rank 1 of 2\n  File \"cell\", line 2, in <module>\n    if .*\n[ ~^]*\nZeroDivisionError",
    SLEEPS: r"^not done after 2 s, ended$",
    "import os\nos._exit(3)": r"^the ranks ended with status \[3, 3\]$",
    "import os\nos.kill(os.getpid(), 9)": r"^the ranks ended with status \[-9, -9\]$",
    "this is no Python": r"^rank \d of 2\n  File \"cell\", line 1\n",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def forks() -> Iterator[None]:
    yield
    torch_cell._end()


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()]


def test_ranks_print_and_give() -> None:
    code = (
        "import torch\nimport torch.distributed as dist\nx = torch.tensor(n + dist.get_rank())\n"
        "dist.all_reduce(x)\ntotal, size = int(x), dist.get_world_size()\nprint(dist.get_rank())"
    )
    printed, given = run(code, 3, take={"n": 5}, give=["total", "size"])
    assert printed == ["0\n", "1\n", "2\n"]
    assert given == {"total": 18, "size": 3}


@pytest.mark.parametrize(("code", "told"), FAILED.items())
def test_failed_ranks_are_reported_and_ended(code: str, told: str) -> None:
    with pytest.raises(RanksError, match=told):
        run(code, 2, seconds=2 if code == SLEEPS else 30)
    assert not children(torch_cell._running[0].pid)
    assert run("x = 1", 1, give=["x"])[1] == {"x": 1}


@pytest.mark.parametrize("ranks", [0, 17])
def test_number_of_ranks_is_limited(ranks: int) -> None:
    with pytest.raises(ValueError, match=r"^ranks: expected 1 to 16, got"):
        run("", ranks)


def test_all_end_with_the_notebook() -> None:
    code = (
        "from tutorials.torch_cell import _running, run\n"
        f"run('', 1)\nprint(_running[0].pid, flush=True)\nrun({SLEEPS!r}, 2)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as notebook:
        assert notebook.stdout is not None
        server = int(notebook.stdout.readline())
        assert until(lambda: len(children(server)) == 2)
        ranks = children(server)
        notebook.kill()
    assert until(lambda: all(gone(process) for process in (server, *ranks)))

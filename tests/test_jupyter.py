"""``%%mpi``: cells of a notebook on real ranks, and what is said when they fail."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lvxattn.mpi_impl.jupyter import CellError, run_cell
from lvxattn.mpi_impl.jupyter.launch import _MARK, find_mpiexec

COMM = "from mpi4py import MPI\ncomm = MPI.COMM_WORLD\n"


def living() -> list[str]:
    """Return the processes that any cell has left behind."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if _MARK.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_every_rank_prints_for_itself() -> None:
    ran = run_cell(COMM + "print('rank', comm.rank)\nprint('of', comm.size)", 3)
    assert ran.printed == [f"rank {rank}\nof 3\n" for rank in range(3)]
    assert ran.given == {}


def test_variables_go_there_and_back() -> None:
    source = COMM + "total = comm.allreduce(step * comm.rank)\nother = [total]"
    assert run_cell(source, 3, take={"step": 5}, give=["total", "other"]).given == {
        "total": 15, "other": [15],
    }  # fmt: skip


def test_a_traceback_begins_in_the_cell_and_is_told_once() -> None:
    source = COMM + "def f():\n    return 1 / 0\nif comm.rank == 1:\n    f()\ncomm.Barrier()"
    with pytest.raises(CellError) as caught:
        run_cell(source, 3)
    text = str(caught.value)
    assert text.startswith("rank 1 of 3 raised\nTraceback")
    assert text.count("ZeroDivisionError") == 1
    assert 'File "cell", line 6' in text
    assert "return 1 / 0" in text
    assert "runpy" not in text
    assert "jupyter" not in text
    assert not living()


def test_what_all_ranks_raise_is_told_once() -> None:
    # All are about to raise when the first one does, and ends the others.
    source = COMM + "comm.Barrier()\nraise ValueError('no')"
    with pytest.raises(CellError) as caught:
        run_cell(source, 2)
    assert str(caught.value).count("ValueError: no") == 1


def test_a_deadlock_ends_and_names_the_lines() -> None:
    source = COMM + (
        "if comm.rank == 0:\n    comm.recv(source=1)\nelif comm.rank == 1:\n"
        "    comm.recv(source=0)  # neither sends\n"
    )
    start = time.monotonic()
    with pytest.raises(CellError) as caught:
        run_cell(source, 3, timeout=2)
    assert time.monotonic() - start < 30
    text = str(caught.value)
    assert "not done after 2 s" in text
    assert "rank 0 is at line 4: comm.recv(source=1)" in text
    assert "rank 1 is at line 6: comm.recv(source=0)  # neither sends" in text
    assert "rank 2 has ended" in text
    assert not living()


def test_a_deadlock_of_ranks_that_start_late_names_the_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = shlex.join(["sh", "-c", 'sleep 1.5; exec "$@"', "late", *find_mpiexec()])
    monkeypatch.setenv("LVXATTN_MPIEXEC", late)
    with pytest.raises(CellError) as caught:
        run_cell(COMM + "comm.recv(source=1 - comm.rank)", 2, timeout=4)
    assert str(caught.value).count("is at line 3: comm.recv") == 2


def test_what_a_rank_starts_is_ended_too() -> None:
    source = COMM + (
        "import subprocess\nsubprocess.Popen(['sleep', '100'], start_new_session=True)\n"
    )
    run_cell(source, 1)
    assert not living()


def test_a_rank_that_is_killed_is_told() -> None:
    source = COMM + "import os\nif comm.rank == 1:\n    os.kill(os.getpid(), 9)\ncomm.Barrier()"
    with pytest.raises(CellError, match="the ranks ended with status"):
        run_cell(source, 2)


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(CellError, match="--take: f cannot be pickled"):
        run_cell("", 1, take={"f": lambda: 0})
    with pytest.raises(CellError, match="--give: rank 0 has no x, y"):
        run_cell("", 2, give=["x", "y"])


def test_an_mpiexec_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_MPIEXEC", "no-such-launcher --flag")
    with pytest.raises(CellError, match="there is no no-such-launcher"):
        run_cell("", 1)


def test_the_launcher_beside_python_is_found_without_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "LVXATTN_MPIEXEC" in os.environ:
        pytest.skip("the launcher is another one")
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_mpiexec() == [str(Path(sys.executable).with_name("mpiexec"))]


NOTEBOOK = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "lvxattn.mpi_impl.jupyter")
shell.user_ns["n"] = 2
shell.run_cell("%%mpi 2 --take n --give m --timeout 30\\nfrom mpi4py import MPI\\n"
               "m = n * MPI.COMM_WORLD.size\\nprint('n is', n)").raise_error()
print("m is", shell.user_ns["m"])
for line in ("0", "x", "2 --take nothing", "2 --give a-b", "2 --timeout -1", "2 --what", ""):
    result = shell.run_cell(f"%%mpi {line}\\n1")
    print("said", type(result.error_in_exec).__name__, result.error_in_exec)
result = shell.run_cell("%%mpi 1\\n1 / 0")
print("shown", result.error_in_exec._render_traceback_()[0].splitlines()[0])
"""


def test_the_magic_reads_its_line_and_labels_ranks() -> None:
    pytest.importorskip("IPython")
    done: Any = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=False,
        env={**os.environ, "IPYTHONDIR": os.devnull},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["rank 0 | n is 2", "rank 1 | n is 2", "m is 4"]
    said = [line for line in lines if line.startswith("said")]
    assert [line.split()[1] for line in said] == ["UsageError"] * 7
    assert "expected a whole number from 1 up, got '0'" in said[0]
    assert "the notebook has no nothing" in said[2]
    assert "expected names of variables, got 'a-b'" in said[3]
    assert "expected seconds above 0, got '-1'" in said[4]
    assert "shown CellError: rank 0 of 1 raised" in lines

"""``%%mpi``: cells of a notebook on real ranks, and the errors when they fail."""

import fcntl
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from lvxattn.mpi_impl.jupyter import CellError, cell_files, guard, run_cell
from lvxattn.mpi_impl.jupyter.launch import find_mpiexec

COMM = "from mpi4py import MPI\ncomm = MPI.COMM_WORLD\n"
OURS = "LVXATTN_TEST"


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Check after every test that its cells have left no processes and no folders."""
    monkeypatch.setenv(OURS, uuid4().hex)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    assert living() == []
    assert list(tmp_path.glob("lvxattn-cell-*")) == []


def living() -> list[int]:
    """Return the running processes that this test has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if os.environ[OURS].encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def error_of(source: str, ranks: int, **options: Any) -> CellError:
    with pytest.raises(CellError) as caught:
        run_cell(source, ranks, **options)
    return caught.value


def test_every_rank_prints_and_shows_its_last_value() -> None:
    ran = run_cell(COMM + "print('rank', comm.rank)\ncomm.size", 3)
    assert ran.printed == [f"rank {rank}\n3\n" for rank in range(3)]
    assert ran.given == {}


def test_stdin_of_every_rank_is_empty() -> None:
    assert run_cell("import sys\nsys.stdin.read()", 2, timeout=60).printed == ["''\n"] * 2


def test_long_output_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_files, "_SHOWN", 8)
    told = "éé\n... 2,000 bytes are left out here ...\nabc\n"
    assert run_cell("print('é' * 1002 + 'abc')\n1;", 1).printed == [told]


def test_carriage_return_shows_last_state(tmp_path: Path) -> None:
    (tmp_path / "printed.0").write_bytes(b"\r 10%\r 99%\ndone\r\n\n5\rlast")
    assert cell_files.printed(tmp_path, 1) == [" 99%\ndone\n\nlast"]


def test_variables_are_passed_in_and_out() -> None:
    source = COMM + (
        "class Point:\n    pass\n"
        "points = comm.gather(Point())  # pickled by one rank, and unpickled by another\n"
        "total = comm.allreduce(step[0] * comm.rank)\nsame = step is again\nother = [total]"
    )
    step = [5]
    take, give = {"step": step, "again": step}, ["total", "same", "other"]
    assert run_cell(source, 3, take=take, give=give).given == {
        "total": 15, "same": True, "other": [15],
    }  # fmt: skip


def test_traceback_begins_in_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    source = COMM + (
        "import sys, warnings\nwarnings.warn('careful')\nprint('before', end='')\n"
        "def f():\n    return 1 / 0\nif comm.rank == 1:\n    f()\ncomm.Barrier()"
    )
    error = error_of(source, 3)
    text = str(error)
    assert text.startswith("rank 1 of 3 raised\nTraceback")
    assert text.count("ZeroDivisionError") == 1
    assert 'File "cell", line 9' in text
    assert "return 1 / 0" in text
    assert "runpy" not in text
    assert "jupyter" not in text
    warned = "cell:4: UserWarning: careful\n  warnings.warn('careful')\n"
    assert error.printed[1] == f"{warned}before"


def test_error_of_all_ranks_is_shown_once() -> None:
    # All are about to raise when the first one does, and ends the others.
    # An address is another one on each of them.
    # UTF-8 has no half of a surrogate pair.
    source = COMM + "comm.Barrier()\nraise ValueError(f'\\ud800 {comm.rank + 1:#x}')"
    assert str(error_of(source, 2)).count("ValueError: \\ud800") == 1


def test_sys_exit_with_status_is_a_failure() -> None:
    source = COMM + "import sys\nx = 1\nsys.exit(status if comm.rank == who else 0)"
    assert run_cell(source, 2, take={"status": None, "who": 0}, give=["x"]).given == {"x": 1}
    text = str(error_of(source, 2, take={"status": 3, "who": 1}))
    assert text.startswith("rank 1 of 2 raised\n")
    assert text.endswith("SystemExit: 3")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = 1\nif x\n", 'File "cell", line 2\n    if x\n'),
        ("x = 1\n%time f()", "ranks run plain Python, but line 2 is for IPython: %time f()"),
        ("files = !ls", "ranks run plain Python, but line 1 is for IPython: files = !ls"),
        ("print?", "ranks run plain Python, but line 1 is for IPython: print?"),
        ("??os.path", "ranks run plain Python, but line 1 is for IPython: ??os.path"),
        ("def f(: # why?", 'File "cell", line 1\n    def f(: # why?\n          ^'),
    ],
)
def test_invalid_python_is_refused_before_ranks_start(
    source: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVXATTN_MPIEXEC", "no-such-launcher")
    assert told in str(error_of(source, 2))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("os.kill(os.getpid(), 9)", r"was ended by signal 9 \(Killed\) before the end of the cell"),
        ("faulthandler._sigsegv()", r"was ended by signal 11 \(.*\) at line 5: faulthandler\._sig"),
        ("os._exit(0)", r"left with status 0 before the end of the cell"),
        ("comm.Abort(7)", r"(called MPI_Abort, with status 7|left with status 7 before .*)"),
    ],
)
def test_dead_rank_is_named_with_its_status(line: str, told: str) -> None:
    source = COMM + f"import faulthandler, os\nif comm.rank == 1:\n    {line}\ncomm.Barrier()"
    with pytest.raises(CellError, match=rf"^rank 1 of 2 {told}"):
        run_cell(source, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a signal at a parent's death")
@pytest.mark.parametrize("line", ["comm.Barrier()", "while True: pass"])
def test_killed_guard_ends_the_cell_and_is_named(line: str) -> None:
    source = (
        COMM
        + f"import os\nif comm.rank == 1:\n    os.kill(os.getppid(), 9)\n    {line}\ncomm.recv()"
    )
    assert str(error_of(source, 2)) == "rank 1 of 2 has ended with its guard, which was killed"


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", 137), ("exit 0", 1)])
def test_launcher_gets_status_of_dead_rank(script: str, status: int, tmp_path: Path) -> None:
    with open(tmp_path / "notebook", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        command = [sys.executable, guard.__file__, str(tmp_path), "60", "sh", "-c", script]
        assert subprocess.run(command, check=False).returncode == status


def test_deadlock_ends_at_timeout_and_shows_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = (
        20 * "\n" + "def wait(comm, depth):\n    wait(comm, depth - 1) if depth else comm.recv()"
    )
    (tmp_path / "supercell.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    source = COMM + (
        "import threading, time\nfrom supercell import wait\n"
        "print('here')\n"
        "if comm.rank == 0:\n    wait(comm, 5)  # nobody sends\n"
        "thread = threading.Thread(target=lambda: time.sleep(100), daemon=comm.rank != 2)\n"
        "thread.start()\n"
        "if comm.rank == 1:\n    comm.recv(source=0)\n"
        "if comm.rank == 3:\n    wait(comm, 200)\n"
        "if comm.rank == 4:\n    sum(range(10**12))\n"
    )
    lines = [
        "rank 0 is at line 7: wait(comm, 5)  # nobody sends",
        "rank 1 is at line 11: comm.recv(source=0)",
        "rank 2 has run the whole cell; a thread of it is at line 8: thread = threading.Thread("
        "target=lambda: time.sleep(100), daemon=comm.rank != 2)",
        "rank 3 is in supercell.py, line 22",
        "rank 4 is at line 15: sum(range(10**12))",
    ]
    for seconds in (4, 16, 60):  # the others, where so many ranks take longer to get there
        start = time.monotonic()
        error = error_of(source, 5, timeout=seconds)
        assert time.monotonic() - start < seconds + 30
        told = str(error).splitlines()
        if told[1:] == lines:
            break
    assert error.printed == 5 * ["here\n"]
    assert told == [f"not done after {seconds} s, ended.", *lines]


def test_ended_rank_gets_no_signal(tmp_path: Path) -> None:
    # Its number may be another process's by now, which SIGUSR1 would end.
    with subprocess.Popen(["sleep", "100"]) as other:
        (tmp_path / "stack.0").write_text(f"{other.pid} 1\n")
        (tmp_path / f"status.{other.pid}").write_text("0")
        cell_files.ask(tmp_path, 1)
        ended = other.poll()
        other.kill()
    assert ended is None


def test_children_of_ranks_are_killed() -> None:
    source = (
        "import os, subprocess\nos.system('sleep 100 &')\n"
        "subprocess.Popen(['sleep', '100'], start_new_session=True, close_fds=False)\n1"
    )
    assert run_cell(source, 2, timeout=60).printed == ["1\n", "1\n"]


def test_ranks_can_spawn() -> None:
    child = "from mpi4py import MPI; up = MPI.Comm.Get_parent(); up.bcast(0); up.Disconnect()"
    source = COMM + (
        "import sys\nmore = comm.Spawn(sys.executable, ['-c', child], maxprocs=2)\n"
        "n = more.remote_size\nmore.bcast(1, root=MPI.ROOT if comm.rank == 0 else MPI.PROC_NULL)\n"
        "more.Disconnect()"
    )
    assert run_cell(source, 2, take={"child": child}, give=["n"]).given == {"n": 2}


NOTEBOOK_THAT_ENDS = """
import os, sys
from lvxattn.mpi_impl.jupyter import launch
launch._LATE = 0.2
try:
    launch.run_cell("import os\\nos.kill(process, number)\\nwhile True:\\n    pass", 2,
                    timeout=float(sys.argv[2]),
                    take={"process": os.getpid(), "number": int(sys.argv[1])})
except launch.CellError as error:
    print(error)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_ranks_end_with_their_notebook(number: int, tmp_path: Path) -> None:
    for seconds in (1.5, 30):  # the second, where ranks take longer to start
        with subprocess.Popen(
            [sys.executable, "-c", NOTEBOOK_THAT_ENDS, str(int(number)), str(seconds)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        ) as notebook:  # fmt: skip
            os.waitid(os.P_PID, notebook.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
            start = time.monotonic()
            while set(living()) - {notebook.pid}:
                assert time.monotonic() - start < seconds + 30
                time.sleep(0.05)
            notebook.send_signal(signal.SIGCONT)
            told = notebook.communicate()[0]
        wanted = "" if number == signal.SIGKILL else f"not done after {seconds:g} s, ended\n"
        if told == wanted:
            break
    assert told == wanted


def test_bad_take_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec("def f(): pass\nclass C: pass", space)
    advice = "which only the notebook has; define it in the cell, or in a module"
    assert str(error_of("", 1, take={"x": 1, "f": space["f"]})) == (
        f"--take: f needs the function f, {advice}"
    )
    assert str(error_of("", 1, take={"x": [space["C"]()]})) == (
        f"--take: x needs the class C, {advice}"
    )
    with pytest.raises(CellError, match=r"^--take: f cannot be pickled: .*lambda"):
        run_cell("", 1, take={"f": lambda: 0})
    gone = types.ModuleType("gone")
    exec("class C: pass", vars(gone))
    monkeypatch.setitem(sys.modules, "gone", gone)
    assert str(error_of("", 2, take={"x": gone.C()})) == (
        "--take: x cannot be unpickled: ModuleNotFoundError: No module named 'gone'"
    )


def test_bad_give_raises() -> None:
    source = (
        "import sys, types\nclass C: pass\nc, f = [C()], lambda: 0\n"
        "exec('class D: pass', vars(module := types.ModuleType('gone')))\n"
        "sys.modules['gone'] = module\nd = module.D()"
    )
    for give, told in {
        "x": "--give: rank 0 has no x",
        "c": "--give: c needs the class C, which only the cell has; define it in a module",
        "d": "--give: d cannot be unpickled: ModuleNotFoundError: No module named 'gone'",
    }.items():
        assert str(error_of(source, 1, give=[give])) == told


def test_files_of_other_users_are_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "give.pickle"
    cell_files.store(file, {"x": 1}, "--give")
    assert cell_files.load(file, "--give") == {"x": 1}
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(CellError, match=r"^--give: .*give\.pickle belongs to another user"):
        cell_files.load(file, "--give")


def test_folder_of_a_cell_is_private() -> None:
    before = os.umask(0)
    try:
        ran = run_cell("import os, sys\noct(os.stat(sys.argv[1]).st_mode)[-3:]", 1)
    finally:
        os.umask(before)
    assert ran.printed == ["'700'\n"]


def test_bad_arguments_and_launchers_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    bad: Any
    for bad in (0, True, 1.5, "2"):
        with pytest.raises(
            ValueError, match=f"^ranks: expected a whole number from 1 up, got {bad!r}"
        ):
            run_cell("", bad)
    for bad in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"^timeout: expected seconds above 0, got {bad!r}"):
            run_cell("", 1, timeout=bad)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(5))
    monkeypatch.setenv("LVXATTN_MPIEXEC", "true")
    assert "no rank was started; true ended with status 0" in str(error_of("", 80))
    assert str(error_of("", 81)) == "81 ranks are too many: at most 80 on 5 cores"
    monkeypatch.setenv("LVXATTN_MPIEXEC", "mpiexec 'a")
    told = "LVXATTN_MPIEXEC: expected a command, got mpiexec 'a (No closing quotation)"
    assert str(error_of("", 1)) == told
    monkeypatch.setenv("LVXATTN_MPIEXEC", "no-such-launcher --flag")
    assert "there is no no-such-launcher" in str(error_of("", 1))
    monkeypatch.setenv("LVXATTN_MPIEXEC", "sh -c 'shift; exec \"$@\"' ")
    assert "2 ranks were started, but MPI sees 1: the launcher" in str(error_of("", 2))


def test_launcher_beside_python_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if "LVXATTN_MPIEXEC" in os.environ:
        pytest.skip("the launcher is another one")
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_mpiexec() == [str(Path(sys.executable).with_name("mpiexec"))]


NOTEBOOK = """
import os
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "lvxattn.mpi_impl.jupyter")
space = shell.user_ns
space["n"] = 2
shell.run_cell("%%mpi 2 --take n --give m , k --timeout 30  # a comment\\n"
               "from mpi4py import MPI\\n"
               "m = k = n * MPI.COMM_WORLD.size\\nprint('n is', n)").raise_error()
print("m and k are", space["m"], space["k"])
for line in ("0", "x", "2 --take nothing", "2 --give a-b", "2 --timeout -1", "2 --what", ""):
    result = shell.run_cell(f"%%mpi {line}\\n1")
    print("said", type(result.error_in_exec).__name__, result.error_in_exec)
space["process"] = os.getpid()
for last in ("1 / 0", "os.kill(process, 2)\\nwhile True: pass"):
    print("--")
    space["m"] = space["n"] = 3
    shell.run_cell("%%mpi 1 --take process,n --give m,n\\nimport os\\n"
                   f"print('before')\\nm = n = 4\\n{last}")
    print("left", "m" in space, space["n"])
"""


@pytest.mark.usefixtures("interruptible")
def test_magic() -> None:
    pytest.importorskip("IPython")
    done: Any = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=False,
        env={**os.environ, "IPYTHONDIR": os.devnull},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["rank 0 | n is 2", "rank 1 | n is 2", "m and k are 4 4"]
    said = [line for line in lines if line.startswith("said")]
    assert [line.split()[1] for line in said] == ["UsageError"] * 7
    assert "'0'" in said[0]
    assert "the notebook has no nothing" in said[2]
    assert "expected names of variables, got 'a-b'" in said[3]
    assert "expected seconds above 0, got '-1'" in said[4]
    raised, interrupted = (part.splitlines() for part in done.stdout.split("--\n")[1:])
    assert raised[:3] == [
        "rank 0 | before",
        "CellError: rank 0 of 1 raised",
        "Traceback (most recent call last):",
    ]
    assert interrupted == [
        "rank 0 | before",
        "CellError: interrupted, ended.",
        "rank 0 is at line 5: while True: pass",
        "left False 3",
    ]
    assert raised[-1] == "left False 3"

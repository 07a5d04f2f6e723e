"""Functions that turn against their process: one line for their case, and the rest goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import pytest

from lvxattn.check import Case, case_of, check, check_distributed, time_limit
from lvxattn.check.call_kernel import LastResults, call_kernel
from lvxattn.check.callers import child_process, fork_server
from lvxattn.check.callers.fork_server import ForkServer
from lvxattn.check.callers.messages import MessageError, receive, send
from lvxattn.check.case_arrays import draw
from lvxattn.check.command import main
from lvxattn.check.frameworks import framework_of
from lvxattn.check.import_target import code_digest, target_of
from lvxattn.check.one_call import ContractError
from lvxattn.check.suite import Caller
from tests import hostile_kernels as hostile
from tests.launch import MARK, _marked, environment, launch, mpiexec, outlived
from tests.oracle import GAUSSIAN, TWO, checked, right

FILE = hostile.__file__
THREE = (*TWO, case_of("dead-rows"))
PYTHON = (sys.executable, "-c")

# What each does to its process, and how the report says so.
DEATHS = {
    hostile.exits: f"ExitError: os._exit(0) would have ended the check ({FILE}:",
    hostile.ends: "the function ended its process with status 0",
    hostile.is_killed: "ended its process by SIGKILL, as when memory runs out",
    hostile.crashes: f"ended its process by SIGSEGV ({FILE}:",
    hostile.closes_all_files: "ended its process with status ",
    hostile.writes_everywhere: "the function disturbed its process",
}
# What each changes in its process.
CHANGES = {
    hostile.changes_exp: "numpy.exp was replaced",
    hostile.changes_the_folder: "the working directory was changed to /",
    hostile.changes_an_old_result: "out: the result for one-key, float64, seed 0 was changed ",
}


def statuses(report: Any) -> list[str]:
    return [row.status for row in report.rows]


@pytest.mark.parametrize("fn", DEATHS, ids=lambda fn: fn.__name__)
def test_death_is_reported_and_other_cases_run(fn: Any) -> None:
    report = checked(fn, THREE)
    assert statuses(report) == ["ok", "error", "ok"]
    assert DEATHS[fn] in report.rows[1].message
    assert "\n" not in report.rows[1].message


@pytest.mark.parametrize("fn", [hostile.keeps_the_lock, hostile.ignores_interrupts])
def test_hanging_process_is_ended_and_other_cases_run(fn: Any) -> None:
    report = checked(fn, THREE, time_limit=3)
    assert statuses(report) == ["ok", "error", "ok"]
    assert report.rows[1].message.startswith(f"did not come back within 3 s ({FILE}:")
    assert report.notes == ("forward only: NumPy has no autograd, and the function no backward",)


def test_a_first_call_that_hangs_is_told_as_such() -> None:
    report = checked(hostile.hangs_in_its_first_call, [GAUSSIAN], time_limit=3)
    (row,) = report.rows
    assert "in its first call: if that compiles, allow more by time_limit" in row.message
    late = checked(hostile.keeps_the_lock, THREE, time_limit=3).rows[1].message
    assert "first call" not in late


def test_a_wait_for_the_file_of_a_lock_is_told_as_such() -> None:
    report = checked(hostile.waits_for_a_lock, THREE, framework="torch", time_limit=3)
    assert statuses(report) == ["ok", "error", "ok"]
    assert report.rows[1].message.startswith(f"did not come back within 3 s ({FILE}:")
    assert "it waits for a lock's file, which a run that was killed" in report.rows[1].message


def test_an_import_that_waits_for_a_lock_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child_process, "_IMPORT", 5.0)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lock").touch()
    lock = str(tmp_path / "lock")
    program = f"from torch.utils.file_baton import FileBaton\nFileBaton({lock!r}).wait()"
    (tmp_path / "locked_kernel.py").write_text(program)
    with pytest.raises(ValueError, match=r"import took more than 5 s \(.*locked_kernel.py:2\): it "
                                         "waits for a lock's file"):  # fmt: skip
        check("locked_kernel:attention", cases=TWO, framework="torch")


def test_an_abort_after_all_calls_is_told() -> None:
    report = checked(hostile.aborts_in_the_end, TWO)
    assert report.passed
    assert report.notes[-1] == "when all calls were done, the function ended its process by SIGABRT"


@pytest.mark.slow
def test_stopped_server_is_ended_and_replaced() -> None:
    report = checked(hostile.stops_its_parent, THREE, time_limit=3)
    assert statuses(report) == ["ok"] * 3
    server = fork_server._SERVERS[""]
    assert server._process.wait(10) == -signal.SIGKILL
    assert statuses(checked(right, THREE)) == ["ok"] * 3


def test_daemons_of_a_function_end_with_it() -> None:
    ended = launch([*PYTHON, "import sys; from tests import hostile_kernels as hostile\n"
                    "from tests.oracle import TWO, checked\n"
                    "print([row.status for row in checked(hostile.leaves_a_daemon, TWO).rows])"],
                   timeout=120)  # fmt: skip
    assert ended.out == "['ok', 'ok']\n", ended.err
    assert not ended.timed_out  # a daemon has its stdout
    assert (ended.status, ended.left) == (0, ())


@pytest.mark.parametrize("here", [False, True], ids=["own process", "this process"])
@pytest.mark.parametrize("fn", CHANGES, ids=lambda fn: fn.__name__)
def test_change_is_reported_and_undone(fn: Any, here: bool) -> None:
    exp, folder = np.exp, os.getcwd()
    report = checked(partial(fn) if here else fn, THREE)
    assert (np.exp, os.getcwd()) == (exp, folder)
    assert statuses(report) == ["ok", "error", "ok"]
    assert report.rows[1].message.startswith(CHANGES[fn])


def test_judge_is_out_of_reach() -> None:
    assert statuses(checked(hostile.changes_the_limits, THREE)) == ["ok", "wrong", "ok"]


@pytest.mark.parametrize("calls", [2, 3])
def test_abandoned_call_ends_later_without_harm(
    calls: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(time_limit, "_JOIN", 0.0)
    leave, exp, folder = os._exit, np.exp, os.getcwd()
    go_on, started = threading.Event(), []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        if k.shape[2] == 128:
            started.append(threading.current_thread())
            vars(np)["exp"] = np.exp2
            os.chdir("/")
            while not go_on.is_set():
                with suppress(BaseException):
                    go_on.wait(60)
        return right(q, k, v, scale=scale, mask=mask)

    report = checked(fn, THREE[:calls], time_limit=0.5)
    assert statuses(report) == ["ok", "error", "ok"][:calls]
    assert (os._exit, np.exp, os.getcwd()) == (leave, exp, folder)
    monkeypatch.chdir(tmp_path)
    go_on.set()
    started[0].join(60)
    assert (os._exit, np.exp, os.getcwd()) == (leave, exp, str(tmp_path))


@pytest.mark.parametrize("late", [False, True])
def test_result_changed_after_the_last_call_is_reported(late: bool) -> None:
    kept = []

    def fn(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        kept.append(right(q, k, v, scale=scale, mask=mask))
        return kept[-1]

    caller = Caller(fn, framework_of(None), False, 30.0)
    caller.call(draw(GAUSSIAN, "float64", 0))
    if late:
        kept[-1][1][0, 0, :3] = np.nan
    rows = caller.changed_results(checked(right, [GAUSSIAN]).rows)
    caller.close()
    said = "lse: the result for gaussian, float64, seed 0 was changed after it was returned (3 of"
    assert [row.message.startswith(said) for row in rows] == [True] * late


def test_last_results_are_forgotten_when_looked_at() -> None:
    last, kept = LastResults(), []

    def fn(q: Any, k: Any, v: Any, **options: Any) -> Any:
        kept.append(right(q, k, v, **options)[0])
        return kept[-1]

    options: dict[str, Any] = {"backward": None, "gradients": False, "last": last}
    call_kernel(fn, draw(GAUSSIAN, "float64", 0), framework_of(None), **options)
    kept[0][...] = 0
    with pytest.raises(ContractError, match="changed after it was returned"):
        last.look_back()
    last.look_back()


def test_output_of_the_function_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert checked(hostile.says_so, [GAUSSIAN]).passed
    assert capfd.readouterr().out == "said by the function\n"


@pytest.mark.parametrize("fn", [hostile.leaves_a_thread, hostile.starts_a_process])
def test_nothing_is_left_behind(fn: Any) -> None:
    program = (
        "from lvxattn.check import case_of, check; from tests import hostile_kernels as hostile; "
        f"print(check(hostile.{fn.__name__}, cases=[case_of('one-key')]).passed)"
    )
    ended = launch([*PYTHON, program], timeout=120)
    assert (ended.status, ended.out, ended.err, ended.left) == (0, "True\n", "", ())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_child_ends_with_the_check(end: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lvxattn.check import case_of, check; from tests import hostile_kernels as hostile\n"
        "check(hostile.ignores_interrupts, cases=[case_of('gaussian')], time_limit=1000)"
    )
    mark = uuid.uuid4().hex
    with (tmp_path / "err").open("w") as err:
        check = subprocess.Popen(
            [*PYTHON, program], env=environment({MARK: mark}), stderr=err, start_new_session=True
        )
        try:
            until = time.monotonic() + 60
            while len(_marked(mark)) < 3:  # the check, the server, and the child
                assert time.monotonic() < until
                time.sleep(0.05)
            time.sleep(0.5)  # it is likely in the call by now
            check.send_signal(end)
            assert check.wait(60) in (-end, 1)
        finally:
            check.kill()
            check.wait()
            left = outlived(mark)
    assert left == ()


def test_server_is_used_again_and_replaced_after_its_death() -> None:
    from lvxattn.check.callers.fork_server import server_with

    server = server_with("")
    assert checked(right, [GAUSSIAN]).passed
    assert server_with("") is server
    server._process.kill()
    server._process.wait()
    assert checked(right, [GAUSSIAN]).passed
    assert server_with("") is not server


def test_interrupted_request_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from lvxattn.check.callers import fork_server

    server = fork_server.server_with("")
    send_fds = fork_server.socket.send_fds

    def interrupted(*args: Any) -> None:
        send_fds(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fork_server.socket, "send_fds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checked(right, [GAUSSIAN])
    assert not server.alive()
    assert server._process.wait(60) == 0
    assert checked(right, [GAUSSIAN]).passed
    assert fork_server.server_with("") is not server


def test_server_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("import os; os._exit(7)")
    monkeypatch.chdir(tmp_path)
    server = ForkServer("")
    server.close()
    assert server._process.returncode == 0


def test_server_closes_twice() -> None:
    server = ForkServer("")
    server.close()
    server.close()
    assert not server.alive()


# What is sent to a process of its own.


class Called:
    def __call__(self, *args: Any, **options: Any) -> Any:
        return right(*args, **options)


def test_targets_are_functions_under_their_names() -> None:
    assert target_of(right) == "tests.oracle:right"
    assert target_of(np.dot) == "numpy:dot"
    for other in (lambda: None, partial(right), Called(), [].append, Called().__call__):
        assert target_of(other) is None


def test_replaced_function_is_not_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
        return right(q, k, v, scale=2 * scale, mask=mask)

    another.__module__, another.__qualname__ = hostile.__name__, "says_so"
    monkeypatch.setattr(hostile, "says_so", another)
    assert target_of(another) == f"{hostile.__name__}:says_so"
    (row,) = checked(another, [GAUSSIAN]).rows  # in its file, says_so is right
    assert row.status == "wrong"


def test_digest_of_code_is_alike_in_all_processes() -> None:
    program = (
        "from lvxattn.check.import_target import code_digest; from tests import hostile_kernels as "
        "hostile; print(code_digest(hostile.has_constants), code_digest(hostile.says_so))"
    )
    found = set()
    for seed in "12":
        env = environment({"PYTHONHASHSEED": seed})
        ended = subprocess.run([*PYTHON, program], env=env, capture_output=True, text=True)
        found.add(ended.stdout)
    (line,) = found
    assert len(set(line.split())) == 2
    assert code_digest(len) == ""


def test_digests_of_other_code_differ() -> None:
    sources = ["def f(a, b): return 1", "def f(a, b): return 1.0", "def f(b, a): return 1"]
    sources += ["def f(a, b): return a.x", "def f(a, b): return a.y", "\ndef f(a, b): return 1"]
    sources += [
        f"def f(a, b):\n    return lambda: {x}" for x in ("0.0", "-0.0", "'0'", "(0, (1,))")
    ]
    digests = set()
    for source in sources:
        names: dict[str, Any] = {}
        exec(source, names)
        digests.add(code_digest(names["f"]))
    assert len(digests) == len(sources)


CHECKS_ITSELF = (
    "from lvxattn.check import case_of, check\nfrom tests.oracle import right\n"
    "with open('imports', 'a') as f:\n    f.write('x')\n"
    "def fn(q, k, v, *, scale, mask):\n"
    "    return right(q, k, v, scale=scale, mask=mask)\n"
    "passed = check(fn, cases=[case_of('one-key')], dtypes=['float64']).passed\n"
)


def test_module_that_checks_its_function_is_imported_once_in_a_child(tmp_path: Path) -> None:
    (tmp_path / "own_check.py").write_text(CHECKS_ITSELF)
    program = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.append('')\n"
        "import own_check; print(own_check.passed)\n"
        "from lvxattn.check import check\ncheck('own_check:fn')"
    )
    ended = launch([*PYTHON, program], timeout=120)
    assert (ended.status, ended.out, ended.left) == (1, "True\n", ())
    assert "ValueError: fn: own_check cannot be imported: RuntimeError: a checked" in ended.err
    assert 'guard that by if __name__ == "__main__":' in ended.err
    assert (tmp_path / "imports").read_text() == "xxx"


def test_settings_of_this_process_apply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = (
        "import os\nimport numpy as np\n"
        "def fn(q, k, v, *, scale, mask):\n"
        "    raise ValueError(f\"{os.environ['LVX']} {os.getcwd()} {np.geterr()['over']}\")\n"
    )
    (tmp_path / "settings_module.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVX", "set")
    with np.errstate(over="raise"):
        (row,) = check("settings_module:fn", cases=[GAUSSIAN], dtypes=["float64"]).rows
    assert row.message.startswith(f"ValueError: set {os.getcwd()} raise ({tmp_path}")


def test_state_is_kept_from_call_to_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = (
        "calls = []\n"
        "def fn(q, k, v, *, scale, mask):\n"
        "    calls.append(1)\n    raise ValueError(f'call {len(calls)}')\n"
    )
    (tmp_path / "counting_module.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # each check imports it anew
        report = check("counting_module:fn", cases=TWO, dtypes=["float64"])
        assert [row.message.partition(" (")[0] for row in report.rows] == [
            "ValueError: call 1",
            "ValueError: call 2",
        ]


def test_own_backward_and_named_backward_are_judged() -> None:
    name = "lvxattn.check.wrong.kernel_base"
    report = check("tests.oracle:right", cases=TWO, backward="tests.oracle:right_backward")
    assert {len(row.verdicts) for row in report.rows} == {5}
    assert report.target == "tests.oracle:right"
    with pytest.raises(ValueError, match=f"^fn: {name} has no 'nothing'"):
        check(f"{name}:nothing")
    with pytest.raises(ValueError, match=r"^backward: no module 'nowhere'"):
        check("tests.oracle:right", backward="nowhere:f")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os; os._exit(0)", "function: its import ended its process with status 0"),
        ("import ctypes; ctypes.string_at(0)", "function: its import ended its process by SIGSEGV"),
        ("fn = 3", "function: expected a function, and"),
    ],
)
def test_hostile_module_is_one_line(
    source: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "hostile_module.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert main(["hostile_module:fn"]) == 2
    assert capsys.readouterr().err.startswith(f"lvxattn check: error: {said}")


def test_command_reports_all_other_cases(tmp_path: Path) -> None:
    line = ["tests.hostile_kernels:exits", "--dtypes", "float32", "--json", str(tmp_path / "x")]
    assert main([*line, "--quiet"]) == 1
    rows = json.loads((tmp_path / "x").read_text())["rows"]
    fatal = {row["case"] for row in rows if case_of(row["case"]).S_KV == hostile.HOSTILE}
    assert "gaussian" in fatal
    assert {row["case"] for row in rows if row["status"] != "ok"} == fatal
    assert main(["tests.hostile_kernels:exits", "--case", "gaussian", "--quiet"]) == 1


def test_virtual_ranks_survive_too() -> None:
    cases = [case_of("one-key")]
    report = check_distributed(hostile.on_ranks, ranks=3, cases=cases, dtypes=["float64"])
    assert report is not None
    said = "the function ended its process with status 4"
    on_2 = {row.message for row in report.rows if row.where.startswith("P=2")}
    assert on_2 == {said}
    assert {row.status for row in report.rows if not row.where.startswith("P=2")} == {"ok"}


@pytest.mark.mpi
def test_exit_of_a_rank_is_reported() -> None:
    line = ["-m", "lvxattn.check", "tests.hostile_kernels:exits_on_a_rank", "--distributed"]
    ended = mpiexec(2, *line, "--dtypes", "float64", "--time-limit", "3", "--no-backward")
    assert ended.status == 1
    assert "rank 1 of 2: ExitError: os._exit(0) would have ended the check" in ended.out
    assert "the rest was not run: ranks did not come back" in ended.out
    assert not ended.left


# Other libraries.


def test_torch_function_ends_its_process() -> None:
    report = checked(hostile.in_torch, THREE, framework="torch")
    assert statuses(report) == ["ok", "error", "ok"]
    assert report.rows[1].message == "the function ended its process with status 3"
    assert [len(row.verdicts) for row in report.rows] == [5, 0, 5]


@pytest.mark.slow
def test_jax_has_the_settings_of_this_process() -> None:
    import jax

    with jax.enable_x64(True):
        # It compiles in its first call.
        report = checked(hostile.in_jax, TWO, framework="jax", time_limit=120)
    report.raise_if_failed()
    assert {len(row.verdicts) for row in report.rows} == {5}


# In this process.

HERE = (
    "import ctypes, os\nfrom lvxattn.check import case_of, check\n"
    "cases = [case_of('one-key'), case_of('gaussian')]\n"
    "def fn(q, k, v, *, scale, mask):\n"
    "    if k.shape[2] == 128:\n        {}\n"
    "    raise NotImplementedError\n"
    "check(fn, cases=cases, dtypes=['float64'], time_limit=0.5)\n"
)


def test_case_is_shown_before_it_ends_this_process() -> None:
    ended = launch([*PYTHON, HERE.format("ctypes.CDLL(None)._exit(3)")], timeout=120)
    assert (ended.status, ended.left) == (3, ())
    assert ended.err.rstrip().endswith("lvxattn check: gaussian, float64, seed 0")


def test_stack_is_shown_if_it_crashes_this_process() -> None:
    ended = launch([*PYTHON, HERE.format("ctypes.string_at(0)")], timeout=120)
    assert ended.status == -signal.SIGSEGV
    shown, _, stack = ended.err.partition("Fatal Python error: Segmentation fault")
    assert shown.rstrip().endswith("lvxattn check: gaussian, float64, seed 0")
    assert 'File "<string>", line 6 in fn' in stack


def test_stack_is_shown_if_this_process_is_stuck(tmp_path: Path) -> None:
    with Stuck(HERE.format("ctypes.PyDLL(None).pause()"), tmp_path / "err") as said:
        assert "lvxattn check: gaussian, float64, seed 0" in said
        assert 'File "<string>", line 6 in fn' in said


@pytest.mark.slow
def test_notebook_shows_the_case_before_its_kernel_ends(tmp_path: Path) -> None:
    start_new_kernel = pytest.importorskip("jupyter_client.manager").start_new_kernel
    seen = tmp_path / "seen"  # nothing that a kernel sends as it ends is sure to arrive
    program = HERE.replace("time_limit=0.5", "time_limit=110").format(
        f"while not os.path.exists({str(seen)!r}): pass\n        ctypes.CDLL(None)._exit(3)"
    )
    manager, client = start_new_kernel(kernel_name="python3", env=environment())
    shown: list[str] = []
    try:
        client.execute(program)
        until = time.monotonic() + 100
        while not any("gaussian" in text for text in shown) and time.monotonic() < until:
            with suppress(Empty):
                data = client.get_iopub_msg(timeout=1)["content"].get("data", {})
                shown += [data["text/plain"]] if data else []
        assert shown == [
            "",
            "lvxattn check: one-key, float64, seed 0",
            "lvxattn check: gaussian, float64, seed 0",
        ]
        seen.touch()
        while manager.is_alive() and time.monotonic() < until:
            time.sleep(0.1)
        assert not manager.is_alive()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


class Stuck:
    """Start a program, and wait until it has written its stack."""

    def __init__(self, program: str, path: Path) -> None:
        self.path = path
        with path.open("w") as err:
            self.process = subprocess.Popen([*PYTHON, program], env=environment(), stderr=err)

    def __enter__(self) -> str:
        until = time.monotonic() + 60
        while "in <module>" not in self.path.read_text() and time.monotonic() < until:
            time.sleep(0.1)
        return self.path.read_text()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


# Messages.


@pytest.fixture
def pair() -> Iterator[Any]:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_messages_arrive_as_sent(pair: Any) -> None:
    ours, theirs = pair
    arrays = {"out": np.arange(6.0).reshape(2, 3), "lse": np.array([-np.inf, np.nan])}
    send(theirs, {"text": "ä\udc80", "number": 1e-300}, arrays | {"dq": np.zeros((0, 3))})
    shapes = {"out": (2, 3), "lse": (2,), "dq": (0, 3), "dk": (1,)}
    header, found = receive(ours, time.monotonic() + 30, shapes)
    assert header == {"text": "ä\udc80", "number": 1e-300}
    assert [found[name].shape for name in found] == [(2, 3), (2,), (0, 3)]
    np.testing.assert_array_equal(found["out"], arrays["out"])
    np.testing.assert_array_equal(found["lse"], arrays["lse"])


@pytest.mark.parametrize(
    "sent",
    [
        b"words instead of a header",
        (2**62).to_bytes(8, "big"),
        (2).to_bytes(8, "big") + b"[]",
        (2).to_bytes(8, "big") + b"{}",
        (2).to_bytes(8, "big") + b"\xff\xfe",
        (17).to_bytes(8, "big") + b'{"arrays": [1,2]}',
        (25).to_bytes(8, "big") + b'{"arrays":{"out":[1000]}}',
        (24).to_bytes(8, "big") + b'{"arrays":{"mask": [2]}}',
        (22).to_bytes(8, "big") + b'{"arrays":{"out": "a"}}',
        (100_000).to_bytes(8, "big") + b"[" * 100_000,
    ],
)
def test_other_messages_are_refused(pair: Any, sent: bytes) -> None:
    ours, theirs = pair
    theirs.sendall(sent)
    with pytest.raises(MessageError):
        receive(ours, time.monotonic() + 30, {"out": (2, 3)})


def test_end_and_silence_are_told_apart(pair: Any) -> None:
    ours, theirs = pair
    with pytest.raises(TimeoutError):
        receive(ours, time.monotonic() + 0.01)
    theirs.close()
    with pytest.raises(EOFError):
        receive(ours, time.monotonic() + 30)
    with pytest.raises(EOFError):
        send(ours, {"text": ""})


def test_custom_cases_are_drawn_alike() -> None:
    case = Case("mine", "", "", S_KV=300, D=24, D_V=3, H=6, H_KV=2, mask="callable", scale=1 / 3)
    assert checked(right, [case], ["float64", "bfloat16"], seeds=2).passed

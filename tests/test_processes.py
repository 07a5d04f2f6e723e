"""The processes beside a rank: stopped ones are found, and one ends with its parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lvxattn.common.processes import stopped, stopped_ranks
from tests.launch import environment, gone, until

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")

LAUNCHERS = [
    {"PMI_SIZE": "9", "PMI_RANK": "7"},
    {"WORLD_SIZE": "9", "RANK": "7", "LOCAL_RANK": "1"},
]


@contextmanager
def child(env: dict[str, str], state: str) -> Iterator[int]:
    """Start a process like a rank, and bring it into a state: sleeping (S) or stopped (T)."""
    clean = {"PATH": os.environ["PATH"]}
    with subprocess.Popen(["sleep", "100"], env=clean | env) as process:
        try:
            if state == "T":
                process.send_signal(signal.SIGSTOP)
            assert until(lambda: state_of(process.pid) == state)
            yield process.pid
        finally:
            process.kill()


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.fixture
def siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process take its children for siblings."""
    monkeypatch.setattr(os, "getppid", os.getpid)


@pytest.mark.usefixtures("siblings")
@pytest.mark.parametrize("env", LAUNCHERS)
def test_stopped_rank_is_found(env: dict[str, str]) -> None:
    with child(env, "S"):
        assert 7 not in stopped_ranks()
    with child(env, "T") as pid:
        assert stopped_ranks()[7] == pid
        assert f"rank 7 of the world (process {pid}) is stopped" in stopped()
    assert stopped() == ""


@pytest.mark.usefixtures("siblings")
def test_stopped_process_that_is_no_rank_is_not_found() -> None:
    with child({}, "T") as pid:
        assert pid not in stopped_ranks().values()


@pytest.mark.usefixtures("siblings")
def test_rank_with_another_variable_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", "this")
    for run, found in ({"RUN": "this"}, True), ({"RUN": "other"}, False), ({}, False):
        with child(LAUNCHERS[1] | run, "T") as pid:
            assert (pid in stopped_ranks("RUN").values()) == found


def test_ranks_of_other_launchers_are_not_found() -> None:
    with child(LAUNCHERS[0], "T") as pid:  # not a sibling
        assert pid not in stopped_ranks().values()


CHILD = """
import os, sys, time
from lvxattn.common.processes import end_with_parent
end_with_parent(int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid())
print(os.getpid(), flush=True)
time.sleep(100)
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_process_ends_with_its_parent() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        assert until(lambda: gone(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_process_whose_parent_has_ended_ends_at_once() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, str(os.getppid())],  # not its parent
        capture_output=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")

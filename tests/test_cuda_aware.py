"""Whether MPI supports device memory: queries of the library, and the self-test."""

import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lvxattn.mpi_impl.transport import cuda_aware
from tests import fake_cupy
from tests.launch import ROOT, gone


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear the caches and the variable."""
    monkeypatch.delenv("LVXATTN_CUDA_AWARE", raising=False)
    for known in (cuda_aware.library_says, cuda_aware.self_test):
        known.cache_clear()
    yield
    monkeypatch.undo()
    for known in (cuda_aware.library_says, cuda_aware.self_test):
        known.cache_clear()


@pytest.mark.parametrize("aware", ["0", "1"])
def test_the_environment_decides(aware: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_CUDA_AWARE", aware)
    monkeypatch.setattr(cuda_aware, "library_says", None)  # is not asked
    assert cuda_aware.cuda_aware() == (aware == "1", f"LVXATTN_CUDA_AWARE={aware}")


def test_bad_variable_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVXATTN_CUDA_AWARE", "yes")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        cuda_aware.cuda_aware()
    assert str(raised.value) == "LVXATTN_CUDA_AWARE: expected auto, 0 or 1, got 'yes'"


def test_unset_means_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cuda_aware.cuda_aware()
    monkeypatch.setenv("LVXATTN_CUDA_AWARE", "auto")
    assert cuda_aware.cuda_aware() == asked
    assert isinstance(asked[0], bool)
    assert asked[1].startswith(("MPIX_", "mpi_memory_alloc_kinds"))


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("libmpi.so.40.40.7", True),
        ("libmpich.so.12.3.1", True),
        ("libmpi_abi.so.0", True),
        ("libmpi_gnu_123.so.12", True),
        ("libmpi_mpifh.so.40", False),
        ("libmpicxx.so.12", False),
        ("libmpi4py.so", False),
    ],
)
def test_each_query_function_is_called(
    name: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = f"7f-80 r-xp 0 08:01 1  /lib/libc.so.6\n80-81 r-xp 0 08:01 2  /opt/mpi of mine/{name}\n"
    monkeypatch.setattr("builtins.open", lambda *_: io.StringIO(maps))
    found = cuda_aware._libmpi()
    monkeypatch.undo()
    assert found == (f"/opt/mpi of mine/{name}" if asked else None)


class OpenMPI:
    """A library with Open MPI's query."""

    def __init__(self, answer: int) -> None:
        self.MPIX_Query_cuda_support = lambda: answer


class MPICH:
    """A library with MPICH's query: a status, and the answer through a pointer."""

    def __init__(self, answer: int, status: int = 0) -> None:
        def query(kind: int, flag: Any) -> int:
            assert kind == 0  # CUDA
            flag._obj.value = answer
            return status

        self.MPIX_GPU_query_support = query


@pytest.mark.parametrize(
    ("library", "answer"),
    [
        (OpenMPI(1), (True, "MPIX_Query_cuda_support")),
        (OpenMPI(0), (False, "MPIX_Query_cuda_support")),
        (MPICH(1), (True, "MPIX_GPU_query_support")),
        (MPICH(0), (False, "MPIX_GPU_query_support")),
        (MPICH(1, status=1), (False, "MPIX_GPU_query_support")),
        (object(), (False, "mpi_memory_alloc_kinds")),
    ],
    ids=lambda x: type(x).__name__,
)
def test_each_library_is_queried_and_a_yes_self_tested(
    library: Any, answer: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_aware.ctypes, "CDLL", lambda path: library)
    assert cuda_aware.library_says() == answer
    for passed in (True, False):
        tests: list[Any] = []

        def self_test(*args: Any, passed: bool = passed, tests: Any = tests) -> tuple[bool, str]:
            tests.append(args)
            return passed, "what happened"

        monkeypatch.setattr(cuda_aware, "self_test", self_test)
        says, why = answer
        if says:
            proved = passed, f"{why} and a self-test: what happened"
            assert cuda_aware.cuda_aware(fake_cupy) == proved
            assert tests == [("tests.fake_cupy", 0)]
        else:
            assert cuda_aware.cuda_aware(fake_cupy) == answer
            assert not tests


RIGHT = f"import sys; sys.stdout.write({cuda_aware.ARRIVED!r})"


@pytest.mark.parametrize(
    ("program", "passed", "how"),
    [
        (RIGHT, True, "device memory arrived"),
        (f"{RIGHT}; sys.exit(3)", False, "failed with status 3"),
        ("pass", False, "failed with status 0"),  # it must say so, too
        ("import sys; sys.exit('some arrived wrong')", False, "status 1 (some arrived wrong)"),
        ("import os; os.abort()", False, "ended by SIGABRT"),
        ("import os; os.kill(os.getpid(), 11)", False, "ended by SIGSEGV"),
        ("import cupy_that_is_not_there", False, "No module named 'cupy_that_is_not_there'"),
    ],
)
def test_self_test_passes_only_if_all_data_arrived(program: str, passed: bool, how: str) -> None:
    got = cuda_aware.outcome([sys.executable, "-c", program], 30)
    assert got[0] is passed
    assert how in got[1]
    assert "\n" not in got[1]


def test_hanging_self_test_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"sys.stdout.write(str(child.pid) + {cuda_aware.ARRIVED!r}); sys.stdout.flush()\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(60)"
    )
    where, start = tmp_path / "child", time.monotonic()
    for seconds in (2, 20):  # the second, where it takes longer to start
        got = cuda_aware.outcome([sys.executable, "-c", program, str(where)], seconds)
        assert got == (False, f"not done after {seconds} s")
        if where.exists():
            break
    while not gone(int(where.read_text())):
        assert time.monotonic() - start < 60
        time.sleep(0.01)


def test_self_test_that_cannot_start_fails() -> None:
    passed, how = cuda_aware.outcome(["/no/such/program"], 1)
    assert not passed
    assert "did not start" in how


def test_self_test_drops_launcher_variables_and_keeps_transports() -> None:
    launched = {
        "PMI_RANK": "1", "PMI_FD": "5", "PMIX_NAMESPACE": "x", "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_MCA_ess_base_jobid": "7", "PRTE_LAUNCHED": "1", "SLURM_PROCID": "1",
        "HYDI_CONTROL_FD": "6", "MPI_LOCALRANKID": "0", "PALS_RANKID": "1",
    }  # fmt: skip
    kept = {
        "OMPI_MCA_pml": "ucx", "OMPI_MCA_btl": "^smcuda", "UCX_TLS": "sm,cuda_copy",
        "FI_PROVIDER": "tcp", "MPICH_GPU_SUPPORT_ENABLED": "1", "LD_LIBRARY_PATH": "/x",
        "CUDA_VISIBLE_DEVICES": "3", "MPI4PY_LIBMPI": "/y", "OPAL_PREFIX": "/z",
        "PMIX_PREFIX": "/z", "PRTE_PREFIX": "/z", "OMPI_MCA_common_cuda_verbose": "1",
    }  # fmt: skip
    alone = cuda_aware.alone(launched | kept)
    assert alone.pop("PYTHONPATH").split(os.pathsep) == [path for path in sys.path if path]
    assert alone == kept


def test_self_test_runs_once_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []

    def outcome(command: Any, seconds: float) -> tuple[bool, str]:
        runs.append(command[-2:])
        return True, "yes"

    monkeypatch.setattr(cuda_aware, "outcome", outcome)
    for device in (0, 1, 0):
        cuda_aware.self_test("cupy", device)
    assert runs == [["cupy", "0"], ["cupy", "1"]]


@pytest.mark.mpi
def test_self_test_program_sends_and_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake device memory, which any MPI supports, and with one that corrupts messages."""
    monkeypatch.syspath_prepend(str(ROOT))
    assert cuda_aware.self_test("tests.fake_cupy", 0) == (True, cuda_aware.ARRIVED)
    passed, how = cuda_aware.self_test("tests.wrong_cupy", 0)
    assert not passed
    assert "of 4096 bytes some arrived wrong" in how

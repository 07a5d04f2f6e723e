"""Errors are the same on all ranks, and no rank waits forever."""

import os
import re
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from tests.errors import says
from tests.launch import PROGRAMS, Ended, mpiexec, report
from tests.torch_ranks import torch_report

pytestmark = pytest.mark.mpi

LAST = "the last rank"
EACH = "each rank names itself"
FLOATS = "float16, bfloat16, float32, float64"
# The error of each call in programs/run_bad_input.py: type; the argument and the values that the
# message contains, or the exact text where no other test asserts it; the rank that it names, None
# if not collective.  {5P} and so on are numbers that depend on P.
Expected = dict[str, tuple[type[Exception], tuple[str, ...] | str, Any]]
EXPECTED: Expected = {
    "q has 3 axes": (ValueError, ("q", "(4, 5, 6)"), 0),
    "D = 0": (ValueError, ("q", "(2, 4, 5, 0)"), 0),
    "k has another B": (ValueError, ("k", "B", "2", "(3, 2, 7, 6)"), 0),
    "H_KV does not divide H": (ValueError, ("k", "H_KV", "4", "(2, 3, 7, 6)"), 0),
    "k has another dtype": (TypeError, ("k", "float64", "float32"), 0),
    "integer q": (TypeError, ("q", FLOATS, "int64"), 0),
    "boolean v": (TypeError, ("v", FLOATS, "bool"), 0),
    "complex q": (TypeError, ("q", FLOATS, "complex128"), 0),
    "q is a list": (TypeError, ("q", "[[1.0]]"), 0),
    "k is None": (TypeError, ("k", "None"), 0),
    "scale is NaN": (ValueError, ("scale", "nan"), 0),
    "scale is a string": (TypeError, ("scale", "'0.5'"), 0),
    "scale is an array": (TypeError, ("scale", "array([1., 1.])"), 0),
    "unknown schedule": (ValueError, ("schedule", "'ulysses'", "'star'"), 0),
    "mask does not broadcast over B": (ValueError, ("mask", "(2, 4, S_Q, 7)", "(3, 1, 1, 7)"), 0),
    "mask's last axis is all keys": (ValueError, ("mask", "7", "(1, 1, 1, {7P+1})"), 0),
    "mask's query axis is neither 1 nor all": (ValueError, ("mask", "{5P}", "({5P+1}, 7)"), 0),
    "mask's query axis is 2 beside B and H": (ValueError, ("mask", "{5P}", "(2, 4, 2, 7)"), 0),
    "integer mask": (TypeError, ("mask", "uint8"), 0),
    "mask is a list": (TypeError, ("mask", "[True, True, True,"), 0),
    "dout has out's shape but for D_V": (ValueError, ("dout", "(2, 4, 5, 3)", "(2, 4, 5, 4)"), 0),
    "dlse has another length": (ValueError, ("dlse", "(2, 4, 5)", "(2, 4, 4)"), 0),
    "integer dout": (TypeError, ("dout", FLOATS, "int64"), 0),
    "backward with 3 axes in q": (ValueError, ("q", "(4, 5, 6)"), 0),
    "make_kv is a name": (TypeError, ("make_kv", "'k_proj'"), 0),
    "make_kv returns nothing": (TypeError, ("make_kv", "NoneType"), 0),
    "make_kv returns three": (TypeError, ("make_kv", "tuple", "3"), 0),
    "make_kv makes keys of another D": (ValueError, ("make_kv: k", "D", "6", "(2, 2, 7, 8)"), 0),
    "make_kv makes a list": (TypeError, ("make_kv: v", "[1.0]"), 0),
    "a layer's q has 3 axes": (ValueError, ("q", "(4, 5, 6)"), 0),
    "the last rank's q has 3 axes": (ValueError, ("q", "(4, 5, 6)"), LAST),
    "the last rank's v is a list": (TypeError, ("v", "[1.0]"), LAST),
    "the last rank's mask is of integers": (TypeError, ("mask", "int64"), LAST),
    "the last rank's query axis": (ValueError, ("mask", "{5P}", "(2, 7)"), LAST),
    "the last rank's dout": (ValueError, ("dout", "(2, 4, 5, 3)", "(2, 4, 5, 4)"), LAST),
    "the last rank's make_kv": (ValueError, ("make_kv: v", "s_kv", "7", "(2, 2, 6, 3)"), LAST),
    "several ranks, and the last one's make_kv raises": (
        RuntimeError,
        "make_kv: expected keys and values, got KeyError: 'k_proj'",
        LAST,
    ),
    "ranks differ in B": (ValueError, ("q", "B", "2", "1"), LAST),
    "ranks differ in H": (ValueError, ("q", "H", "4", "2"), LAST),
    "ranks differ in H_KV": (ValueError, ("k", "H_KV", "2", "4"), LAST),
    "ranks differ in D": (ValueError, ("q", "D", "6", "8"), LAST),
    "ranks differ in D_V": (ValueError, ("v", "D_V", "3", "9"), LAST),
    "ranks differ in dtype": (TypeError, ("q", "dtype", "float64", "float32"), LAST),
    "ranks differ in scale": (ValueError, ("scale", "0.4082482904638631", "0.25"), LAST),
    "unknown queries": (ValueError, ("queries", "'sharded'", "'replicated'", "'mirrored'"), 0),
    "ranks differ in replicated queries": (
        ValueError,
        "q: expected rank 0's s_q = 5 with queries 'replicated', got 6",
        LAST,
    ),
    "ranks differ in keys": (ValueError, ("keys", "'sharded'", "'replicated'"), LAST),
    "ranks differ in replicated keys": (
        ValueError,
        "k: expected rank 0's s_kv = 7 with keys 'replicated', got 6",
        LAST,
    ),
    "ranks differ in schedule": (ValueError, ("schedule", "'lv-xattn'", "'gather'"), LAST),
    "ranks differ in the backward's schedule": (
        ValueError,
        ("schedule", "'lv-xattn'", "'auto'"),
        LAST,
    ),
    "ranks differ in queries": (ValueError, ("queries", "'sharded'", "'replicated'"), LAST),
    "ranks differ in rules with ring": (ValueError, ("mask", "callable", "'ring'"), LAST),
    "ranks differ in rules with ulysses": (ValueError, ("mask", "callable", "'ulysses'"), LAST),
    "several ranks and one head with ulysses": (
        ValueError,
        ("schedule", "'ulysses'", "H_KV", "{P}", "1"),
        0,
    ),
    "several ranks and one head with ulysses, backward": (
        ValueError,
        ("schedule", "'ulysses'", "H_KV", "{P}", "1"),
        0,
    ),
    "the last rank's machine is a name": (TypeError, ("machine", "str"), LAST),
    "the last rank's machine computes nothing": (ValueError, ("machine", "matmul", "0"), LAST),
    "the last rank's machine has no link": (
        ValueError,
        "machine: expected a Link for inside in machine, got None",
        LAST,
    ),
    "every rank has its own error": (ValueError, ("scale", "nan"), 0),
}


# NumPy's and CuPy's arrays, and communicators.
OF_ARRAYS: Expected = {
    "a mask in the communicator's place": (TypeError, ("comm", "(5, 7)", "mask="), None),
    "q is of another library": (TypeError, ("q", "Other of __main__"), 0),
    "the backward's q is of another library": (TypeError, ("q", "Other of __main__"), 0),
    "the last rank's q is of another library": (TypeError, ("q", "Other of __main__"), LAST),
    "the last rank's mask is of another library": (TypeError, ("mask", "numpy", "__main__"), LAST),
    "the last rank's lse is of another library": (TypeError, ("lse", "numpy", "fake_cupy"), LAST),
    "ranks differ in library": (TypeError, ("q", "'numpy'", "'fake_cupy'"), LAST),
    "ranks differ in the backward's library": (TypeError, ("q", "'numpy'", "'fake_cupy'"), LAST),
    "ranks differ in the library of their parts": (
        TypeError,
        "x: expected a numpy array as on rank 0, got Other",
        LAST,
    ),
    "ranks differ in what they join": (TypeError, ("x", "numpy", "list"), LAST),
}
# PyTorch's tensors, groups and modules.
OF_TENSORS: Expected = {
    "k is on another device": (ValueError, "k: expected q's device cpu, got meta", 0),
    "the mask is on another device": (ValueError, ("mask", "cpu", "meta"), 0),
    "the mask wants a gradient": (
        ValueError,
        "mask: expected a constant, got a tensor that requires a gradient",
        0,
    ),
    "v is a DTensor": (
        TypeError,
        "v: expected this rank's part as a plain tensor, got a DTensor; v.to_local() gives it",
        0,
    ),
    "q is nested": (TypeError, ("q", "nested tensor"), 0),
    "the last rank's rule fails": (
        ValueError,
        ("mask", "UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'invalid start byte')"),
        LAST,
    ),
    "the last rank's make_kv makes sparse values": (
        TypeError,
        ("make_kv: v", "torch.sparse_coo"),
        LAST,
    ),
    "the last rank's x": (ValueError, "x: expected shape (B, s_q, 8), got (2, 5, 9)", LAST),
    "the last rank's features have another width": (
        ValueError,
        ("features", "(B, s_kv, 9)", "(2, 7, 8)"),
        LAST,
    ),
    "the last rank's features have another B": (
        ValueError,
        "features: expected B = 2 as x has it, got (1, 7, 9)",
        LAST,
    ),
    "the last rank's features have 2 axes": (
        ValueError,
        ("features", "(B, s_kv, 9)", "(7, 9)"),
        LAST,
    ),
    "the last rank's features are NumPy's": (
        TypeError,
        "features: expected a torch tensor, got ndarray",
        LAST,
    ),
    "q is sparse": (
        TypeError,
        "q: expected a strided tensor, got a tensor of layout torch.sparse_coo",
        0,
    ),
    "k is an array of NumPy": (TypeError, ("k", "torch", "numpy"), 0),
    "q is an array of NumPy": (TypeError, "q: expected a torch tensor, got ndarray of numpy", 0),
    "the last rank's arrays are NumPy's": (TypeError, ("q", "torch", "ndarray of numpy"), LAST),
    "the last rank's mask is NumPy's": (TypeError, ("mask", "torch", "numpy"), LAST),
    "parts are NumPy's": (TypeError, ("x", "torch", "ndarray of numpy"), EACH),
    "ranks differ in the library of their parts, with tensors": (
        TypeError,
        ("x", "torch", "ndarray"),
        LAST,
    ),
    "a mesh of two dimensions": (
        ValueError,
        "group: expected a mesh of one dimension, as mesh['context'] gives it, "
        "got 2 dimensions ('context', 'data')",
        None,
    ),
    "a group of another kind": (
        TypeError,
        "group: expected a ProcessGroup, a one-dimensional DeviceMesh or None, got str",
        None,
    ),
    "a mask in the group's place": (TypeError, ("group", "Tensor", "(5, 7)", "mask="), None),
    "a rule in the group's place": (TypeError, ("group", "function rule", "mask="), None),
    "a layout of other queries": (
        ValueError,
        "queries: expected the layout's 'sharded', got 'replicated'",
        EACH,
    ),
    "dropout": (
        ValueError,
        "dropout: expected 0, got 0.1: ranks would not drop what one process drops",
        None,
    ),
    "heads that do not divide": (
        ValueError,
        "num_heads: expected a divisor of embed_dim = 8, or a head_dim, got 3",
        None,
    ),
    "kv heads that do not divide": (
        ValueError,
        "num_kv_heads: expected a divisor of num_heads = 4, got 3",
        None,
    ),
    "no width": (ValueError, "embed_dim: expected a whole number from 1 up, got 0", None),
    "the last rank's mask wants a gradient": (ValueError, ("mask", "gradient"), LAST),
    "ranks differ in gradients": (
        ValueError,
        ("call", "'forward'", "'forward and backward'"),
        LAST,
    ),
    "ranks differ in lse": (ValueError, ("call", "'forward'", "'forward, with lse'"), LAST),
}
OF_BACKWARD = {"dout has out's shape but for D_V", "dlse has another length", "integer dout"}
OF_BACKWARD |= {"backward with 3 axes in q", "the last rank's dout"}
OF_BACKWARD |= {"ranks differ in the backward's schedule"}
OF_BACKWARD |= {"several ranks and one head with ulysses, backward"}
IN_TORCH = {n: e for n, e in EXPECTED.items() if n not in OF_BACKWARD} | OF_TENSORS
IN_MPI = EXPECTED | OF_ARRAYS
BAD = [("mpi", name) for name in IN_MPI] + [("torch", name) for name in IN_TORCH]
REPORTS = {"mpi": report, "torch": torch_report}


def pattern(name: str, P: int, by: int) -> str:
    """Return a pattern for the message that rank `by` of P raises."""
    _, wanted, rank = (IN_MPI | IN_TORCH)[name]
    rank = P - 1 if rank is LAST else by if rank is EACH else rank
    if isinstance(wanted, str):
        end = "" if rank is None else f" (on rank {rank} of {P})"
        return f"^{re.escape(wanted + end)}$"
    numbers = {"{P}": P, "{5P}": 5 * P, "{5P+1}": 5 * P + 1, "{7P+1}": 7 * P + 1}
    for symbol, number in numbers.items():
        wanted = tuple(value.replace(symbol, str(number)) for value in wanted)
    return says(*wanted, rank=rank, of=P)


@pytest.mark.parametrize("P", [1, pytest.param(2, marks=pytest.mark.slow), 3])
class TestBadInput:
    @pytest.mark.parametrize(("implementation", "name"), BAD)
    def test_bad_input_raises_same_error_on_all_ranks(
        self, implementation: str, name: str, P: int
    ) -> None:
        if P == 1 and name.startswith(("ranks differ", "several ranks", "every rank")):
            pytest.skip("one rank has nobody to differ from")
        expected, _, names = (IN_MPI | IN_TORCH)[name]
        ranks = REPORTS[implementation](P, "run_bad_input.py")[name]
        for rank, (kind, text, in_time, still_works) in enumerate(ranks):
            assert kind == expected.__name__
            assert re.search(pattern(name, P, rank), text), text
            assert ("(on rank " in text) == (names is not None)
            assert in_time
            assert still_works
        assert len({text for _, text, *_ in ranks}) == (P if names is EACH else 1)

    @pytest.mark.parametrize("implementation", REPORTS)
    def test_table_of_errors_is_complete(self, implementation: str, P: int) -> None:
        ranks = REPORTS[implementation](P, "run_bad_input.py")
        assert set(ranks) == set({"mpi": IN_MPI, "torch": IN_TORCH}[implementation])
        assert all(len(results) == P for results in ranks.values())


# Seconds that all ranks have to end in, start-up included; it takes about one.
SOON = 60.0
PASSES = "forward", "backward"
PLACES = "before", "in the first attend", "in the second attend", "in a wait", "in the last shift"


def fail(
    P: int, rank: int, how: str, place: str, which: str, *more: str, timeout: float = SOON
) -> Ended:
    """Run a program in which one rank fails."""
    arguments = str(rank), how, place, which, *more
    return mpiexec(P, PROGRAMS / "run_fault.py", *arguments, timeout=timeout)


def assert_ended(ended: Ended) -> None:
    """Assert that all ranks have failed in time, and none reached the end."""
    assert not ended.timed_out, ended.err
    assert ended.left == ()
    assert ended.status != 0
    assert "reached the end" not in ended.out


# The fast tests alternate: one place in a forward, the next in a backward.
RAISES = [
    pytest.param(place, which, marks=[] if (n + m) % 2 == 0 else pytest.mark.slow)
    for n, place in enumerate(PLACES)
    for m, which in enumerate(PASSES)
]


@pytest.mark.parametrize(("place", "which"), RAISES)
def test_rank_that_raises_ends_all_and_is_named(place: str, which: str) -> None:
    ended = fail(3, 1, "raise", place, which)
    assert_ended(ended)
    assert ended.err.count("RuntimeError: broken on purpose") == 1
    if place == "before":  # the user's own code: named by MPI, if by anybody
        assert "raised on rank" not in ended.err
    else:
        assert ended.err.count("raised on rank 1 of 3") == 1


@pytest.mark.parametrize("which", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mask raises", r"ZeroDivisionError: "),
        ("mask returns floats", r"TypeError: mask: .*float64"),
        ("misfit", r"ValueError: k: .*\(1, 1, 4, 4\).*\(1, 1, 3, 4\).* \(on rank 2 of 4\)"),
        ("other scale", r"ValueError: scale: .*0\.5.*0\.25.* \(on rank 2 of 4\)"),
    ],
)
def test_error_noticed_by_one_rank_ends_all_and_is_named(
    how: str, message: str, which: str
) -> None:
    ended = fail(4, 2, how, "before", which)
    assert_ended(ended)
    assert len(re.findall(message, ended.err)) == 1
    assert "on rank 2 of 4" in ended.err


MOMENTS = [(moment, which) for moment in ("begins", "computes", "ends") for which in PASSES]
HOPS = [(P, hop) for P in (2, 3, 5) for hop in range(1, P)]
# The fast tests have every hop with one moment of a pass, and every moment with one hop.
DEATHS = [
    (3, 2, "kill", "before", "forward"),
    (3, 2, "crash", "in the first attend", "forward"),
    (3, 2, "kill", "in a wait", "forward"),
    (3, 2, "kill", "in the last shift", "backward"),
    (3, 2, "crash", "in the second attend", "backward"),
    *(
        pytest.param(
            *(P, hop % P, "kill", f"hop {hop} {moment}", which),
            marks=[] if (n - m) % len(MOMENTS) == 0 else pytest.mark.slow,
        )
        for n, (P, hop) in enumerate(HOPS)
        for m, (moment, which) in enumerate(MOMENTS)
    ),
]


@pytest.mark.parametrize(("P", "rank", "how", "place", "which"), DEATHS)
def test_rank_that_dies_ends_all_and_is_named(
    P: int, rank: int, how: str, place: str, which: str
) -> None:
    ended = fail(P, rank, how, place, which)
    assert_ended(ended)
    assert announced(ended, P) == [str(rank)]
    assert "raised on" not in ended.err


def announced(ended: Ended, P: int) -> list[str]:
    """Return the ranks whose deaths were announced."""
    return re.findall(rf"^rank (\d) of {P} \(process \d+ on \S+\) died$", ended.err, re.M)


@pytest.mark.skipif("LVXATTN_MPIEXEC" in os.environ, reason="the launcher may be another one")
@pytest.mark.parametrize("how", ["kill", "crash"])
def test_program_names_its_dead_rank_by_itself(how: str) -> None:
    ended = fail(3, 0, how, "hop 1 computes", "forward", "by itself")
    assert_ended(ended)
    assert announced(ended, 3) == ["0"]


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_forked_child_changes_no_death_notice(how: str) -> None:
    """Neither does its end count as the rank's, nor its life."""
    ended = fail(2, 1, how, "before", "forward", "fork")
    assert announced(ended, 2) == (["1"] if how == "kill" else [])
    assert ("broken on purpose" in ended.err) == (how == "raise")


@pytest.mark.parametrize(
    ("launcher", "end", "asked"),
    [
        # It may have taken the end of the process for its proper end.
        ("hydra", "os._exit(3)", b"cmd=abort exitcode=3\n"),
        ("hydra", "os.kill(os.getpid(), 9)", b""),  # it sees that by itself
        # It lets the other ranks wait.
        ("slurm", "os._exit(3)", b"cmd=abort exitcode=3\n"),
        ("slurm", "os.kill(os.getpid(), 9)", b"cmd=abort exitcode=137\n"),
    ],
)
def test_death_asks_the_launcher_to_abort(launcher: str, end: str, asked: bytes) -> None:
    ours, theirs = socket.socketpair()
    slurms = "os.environ['PMI_JOBID'] = '7.0'; " if launcher == "slurm" else ""
    program = (
        "import os, sys; from mpi4py import MPI; from lvxattn.mpi_impl import announce_death\n"
        f"os.environ['PMI_FD'] = sys.argv[1]; {slurms}announce_death(MPI.COMM_WORLD); {end}"
    )
    env = {name: x for name, x in os.environ.items() if not name.startswith("PMI_")}
    command = [sys.executable, "-c", program, str(theirs.fileno())]
    # The process is a zombie until the shell has ended, as under a launcher that is not faster.
    with (
        ours,
        subprocess.Popen(
            command, env=env, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        ) as process,
    ):
        theirs.close()
        assert process.stderr is not None
        assert b" died\n" in process.stderr.read()
        ours.settimeout(60)
        assert ours.recv(100) == asked


@pytest.mark.parametrize("one", [False, True], ids=["all", "one"])
def test_interrupt_is_a_line(one: bool) -> None:
    program = PROGRAMS / "interrupt_run.py"
    ended = mpiexec(3, program, "1" if one else "all", strict=False)
    assert ended.status not in (0, None)
    assert not ended.timed_out
    assert "lvxattn: interrupted on rank " in ended.err
    assert "Traceback" not in ended.err
    assert ended.left == ()


def test_no_death_notice_when_all_end_well() -> None:
    ended = fail(3, 1, "not at all", "before", "forward")
    assert (ended.status, ended.out, ended.err) == (0, "reached the end\n" * 3, "")
    assert ended.left == ()


def test_hanging_program_is_ended_at_its_time_limit() -> None:
    """One rank exits before the others; they wait, as MPI must, until the time limit."""
    ended = fail(3, 1, "leave", "before", "forward", timeout=3.0)
    assert ended.timed_out
    assert ended.left == ()
    assert ended.seconds < 3.0 + 30.0
    assert "reached the end" not in ended.out


def test_process_outliving_its_rank_is_killed() -> None:
    """The tests' own launcher reports processes that outlive their rank."""
    ended = fail(1, 0, "leave a process", "before", "forward")
    assert ended.status == 0
    assert [command.split()[0] for command in ended.left] == ["sleep"]


def test_launcher_exits_with_signal_of_killed_rank() -> None:
    """So that a shell script sees it; MPICH does so, other launchers differ."""
    assert fail(2, 1, "kill", "before", "forward").status in (signal.SIGKILL, 128 + signal.SIGKILL)


@pytest.mark.skipif("LVXATTN_MPIEXEC" in os.environ, reason="the MPI may be another one")
def test_killed_command_leaves_no_shared_memory() -> None:
    ended = mpiexec(2, PROGRAMS / "kill_command.py", "1", "run", "--text-tokens", "64")
    assert announced(ended, 2) == ["1"]
    # When the rank dies, the file has no name any more: nobody needs to remove it.
    assert re.findall(r"/dev/shm/mpich_\w+( \(deleted\))?", ended.out) == [" (deleted)"]

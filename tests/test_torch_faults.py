"""A rank of a process group fails: the others end in time, and name what they waited for."""

import json
import re
import subprocess
import sys
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from lvxattn.common.meter import Block
from lvxattn.common.wire import NAMES
from tests.launch import MARK, PROGRAMS, environment, gone, launch, outlived, until
from tests.torchrun import OUTSIDE, TORCHRUN, torchrun

# As programs/torch_fault.py has them: P, rank, how, where, schedule, pass.
CASES = [
    (3, 1, "kill", "before", "lv-xattn", "forward"),
    (3, 1, "kill", "hop 1 begins", "lv-xattn", "forward"),
    (3, 0, "kill", "hop 2 computes", "lv-xattn", "backward"),
    (3, 2, "kill", "hop 0 computes", "replicated", "forward"),
    (3, 1, "kill again", "hop 1 computes", "ring", "backward"),
    (2, 1, "raise", "hop 1 computes", "lv-xattn", "forward"),
    (3, 1, "raise", "hop 1 ends", "ring", "backward"),
    (3, 1, "refuse", "a post", "lv-xattn", "forward"),
    (3, 1, "mask raises", "at once", "ring", "backward"),
    (2, 0, "mask raises", "at once", "replicated", "forward"),
    (3, 1, "stop", "hop 1 computes", "lv-xattn", "forward"),
    (3, 1, "stop", "hop 1 begins", "ring", "forward"),
    (2, 1, "stop", "hop 1 computes", "ring", "backward"),
    (3, 1, "stop", "hop 0 computes", "replicated", "backward"),
    (3, 1, "stop again", "hop 1 computes", "lv-xattn", "backward"),
]
MORE = [
    (3, 1, "kill", "before", "ring", "backward"),
    (3, 1, "kill", "hop 1 ends", "lv-xattn", "forward"),
    (3, 1, "kill", "hop 1 computes", "ring", "backward"),
    (2, 1, "kill", "hop 1 begins", "lv-xattn", "backward"),
    (3, 1, "raise", "before", "lv-xattn", "forward"),
    (3, 1, "raise", "hop 1 begins", "ring", "forward"),
    (3, 1, "raise", "hop 0 computes", "replicated", "backward"),
    (2, 0, "refuse", "a post", "ring", "backward"),
    (3, 1, "mask raises", "at once", "lv-xattn", "forward"),
    (3, 1, "stop", "before", "lv-xattn", "forward"),
]


def cases(how: str = "") -> pytest.MarkDecorator:
    """Return a mark for all cases in which a rank fails in this way, some of them slow."""
    fast = [case for case in CASES if how in case[2]]
    slow = [pytest.param(case, marks=pytest.mark.slow) for case in MORE if how in case[2]]
    return pytest.mark.parametrize("case", fast + slow, ids=lambda case: "-".join(map(str, case)))


# The rank calls two backwards in a different order than the others.
ORDERS = [
    (3, 1, "other order", "one layout", "lv-xattn", "backward"),
    (2, 0, "other order", "two layouts", "ring", "backward"),
    (2, 1, "other order", "one layout", "gather", "backward"),
]

# Seconds: the groups' timeout, more to notice that another rank has failed, and for Python to exit.
TIMEOUT, SLACK, ENDING = 3.0, 15.0, 30.0

QUERIES, RESULTS = NAMES["lv-xattn"]
KEYS, GRADIENTS = NAMES["ring"]
AGREED, JOINED = TOGETHER = "all ranks' objects to be gathered", "all ranks' results to be joined"


def waited(rank: int, P: int) -> str:
    """Return the beginning of the message of a failed wait."""
    return f"rank {rank} of {P} failed while waiting for "


def report(case: tuple[Any, ...]) -> dict[str, Any]:
    """Return how the ranks of a case ended."""
    return _reports(case in MORE)[case]


@cache
def _reports(more: bool) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return how the ranks of every case ended; all run once, in one launch."""
    all_cases = MORE if more else CASES + ORDERS
    program = [sys.executable, "-W", "error", str(PROGRAMS / "torch_fault.py")]
    ended = launch([*program, json.dumps(all_cases)], timeout=280.0)
    assert (ended.status, ended.err, ended.left, ended.timed_out) == (0, "", (), False)
    return dict(zip(all_cases, json.loads(ended.out), strict=True))


def awaited(case: tuple[Any, ...], rank: int) -> set[str]:
    """Return everything that a rank can wait for in a pass of this case."""
    P, _, _, place, schedule, which = case
    if schedule == "replicated":
        return {JOINED}
    if place == "before" and which == "forward":
        return {AGREED}
    left, right = (rank - 1) % P, (rank + 1) % P
    found = set()
    for kind in NAMES[schedule]:
        for hop in range(1, P + 1):
            coming = str(Block(kind, (rank - hop) % P, hop, source=left))
            leaving = str(Block(kind, (rank - hop + 1) % P, hop, dest=right))
            found |= {coming, leaving, f"{coming}, or {leaving}"}
    return found


def said(case: tuple[Any, ...]) -> dict[int, str]:
    """Return what each rank but the failing one reports to have waited for."""
    found = {}
    for rank, err in enumerate(report(case)["err"]):
        if rank != case[1]:
            errors = re.findall(rf"RuntimeError: {waited(rank, case[0])}(.*?): .+", err)
            assert len(errors) == 1, err
            found[rank] = errors[0]
    return found


@cases()
def test_other_ranks_end_in_time_and_name_their_wait(case: tuple[Any, ...]) -> None:
    P, failing, how = case[:3]
    ended = report(case)
    assert not ended["killed"], ended["err"]
    assert ended["out"] == [""] * P  # no rank reached the end
    for rank, status in enumerate(ended["status"]):
        # PyTorch aborts a process now and then, after its traceback, when it ends with a group.
        killed = rank == failing and how.startswith("kill")
        assert status in ({-9} if killed else {1, -6}), ended["err"]
    assert max(ended["raised"][:failing] + ended["raised"][failing + 1 :]) < TIMEOUT + SLACK
    assert max(ended["seconds"]) < TIMEOUT + SLACK + ENDING
    for rank, what in said(case).items():
        assert what in awaited(case, rank), (rank, what)
    # Some rank names the failed one, where waits can name ranks.
    waits = set(said(case).values())
    names = re.compile(rf"from rank {failing}\b|rank {failing} to take")
    assert waits <= set(TOGETHER) or any(map(names.search, waits)), waits


@cases()
def test_cause_is_chained(case: tuple[Any, ...]) -> None:
    for rank, err in enumerate(report(case)["err"]):
        if rank != case[1]:  # gloo's error, and below it ours
            assert err.count("The above exception was the direct cause") >= 1
            gloo, ours = re.findall(r"RuntimeError: (.*)", err)[:2]
            assert ours.endswith(gloo)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (
            (3, 1, "stop", "hop 1 computes", "lv-xattn", "forward"),
            {
                # What rank 1 had begun to send may have come, or not: then rank 2 has nothing to
                # pass on to rank 0.
                0: {
                    Block(RESULTS, 2, 2, dest=1),
                    Block(QUERIES, 1, 2, source=2),
                },
                2: {
                    Block(QUERIES, 1, 1, source=1),
                    Block(QUERIES, 0, 2, source=1),
                    Block(RESULTS, 0, 2, source=1),
                },
            },
        ),
        (
            (3, 1, "stop", "hop 1 begins", "ring", "forward"),
            {
                0: {
                    Block(KEYS, 2, 2, dest=1),
                    Block(KEYS, 1, 2, source=2),
                },
                2: {
                    Block(KEYS, 1, 1, source=1),
                    Block(KEYS, 0, 2, source=1),
                },
            },
        ),
        (
            (2, 1, "stop", "hop 1 computes", "ring", "backward"),
            {
                0: {
                    Block(KEYS, 1, 1, source=1),
                    Block(GRADIENTS, 0, 2, source=1),
                }
            },
        ),
    ],
)  # fmt: skip
def test_stopped_rank_is_waited_for_until_timeout(
    case: tuple[Any, ...], what: dict[int, set[Block]]
) -> None:
    for rank, words in said(case).items():
        assert words in map(str, what[rank])
        assert report(case)["raised"][rank] > TIMEOUT - 0.5
    # The first rank to time out may end another's wait for it, shortly before that one's timeout.
    assert any(f"{1000 * TIMEOUT:.0f}ms" in err for err in report(case)["err"])


@cases("stop")
def test_stopped_rank_ends_when_it_continues(case: tuple[Any, ...]) -> None:
    last = report(case)["err"][case[1]].rstrip().split("RuntimeError: ")[-1]
    assert last.startswith(waited(case[1], case[0]))


@cases("again")
def test_failed_group_raises_again(case: tuple[Any, ...]) -> None:
    for rank, again in enumerate(report(case)["again"]):
        if rank != case[1]:
            seconds, words = again
            assert seconds < TIMEOUT + SLACK
            assert words.startswith(waited(rank, case[0]))


@cases("mask raises")
def test_users_error_keeps_its_type_and_names_its_rank(case: tuple[Any, ...]) -> None:
    err = report(case)["err"][case[1]]
    assert "ZeroDivisionError: of the user's own\n" in err
    assert err.count(f"raised on rank {case[1]} of {case[0]}") == 1
    assert "RuntimeError" not in err


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: "-".join(map(str, case)))
def test_backwards_in_different_order_raise(case: tuple[Any, ...]) -> None:
    P, other, _, place = case[:4]
    ended = report(case)
    assert not ended["killed"], ended["err"]
    assert ended["out"] == [""] * P  # nobody reached the end
    forward = r"forward (\d) of the layout of (\d\d:\d\d:\d\d\.\d{6}) UTC"
    error = (
        rf"RuntimeError: rank (\d) of {P} received, in the backward of {forward}, .* of {forward}: "
    )
    seen = {}
    for rank, err in enumerate(ended["err"]):
        for number, *names in re.findall(error, err):
            assert int(number) == rank
            seen[rank] = tuple(names[:2]), tuple(names[2:])
            assert "call the backwards of several forwards in one order on all ranks" in err
    # The one that has another, and whoever gets its block, unless the other of the two has ended
    # before; the third fails while waiting for them.
    assert seen
    assert set(seen) <= {other, (other + 1) % P}
    mine, its = seen[other] if other in seen else seen[(other + 1) % P][::-1]
    assert seen.get((other + 1) % P, (its, mine)) == (its, mine)
    if place == "one layout":
        assert (mine[0], its[0], mine[1]) == ("2", "1", its[1])
    else:
        assert (mine[0], its[0]) == ("1", "1")
        assert mine[1] > its[1]
    for rank in set(range(P)) - set(seen):
        assert "failed while waiting for" in ended["err"][rank]


def test_refused_send_is_reported_on_its_rank() -> None:
    case = (3, 1, "refuse", "a post", "lv-xattn", "forward")
    coming, leaving = Block(QUERIES, 0, 1, source=0), Block(QUERIES, 1, 1, dest=2)
    assert (
        f"RuntimeError: {waited(1, 3)}{coming}, or {leaving}: the transport took none of 2"
    ) in report(case)["err"][1]


@pytest.mark.slow  # a rank that raises is among the cases above
def test_torchrun_ends_all_ranks_when_one_raises() -> None:
    ended = torchrun(2, PROGRAMS / "torch_mask.py")
    assert not ended.timed_out
    assert (ended.status, ended.out, ended.left) == (1, "", ())
    assert "ZeroDivisionError: of the user's own\n" in ended.err
    assert "raised on rank 1 of 2" in ended.err
    assert "terminate called" not in ended.err  # by a thread that runs while Python exits
    assert "exitcode  : 1 " in ended.err


# Whether ranks of torchrun end is a matter of torchrun: these start it, in 10 s each.
ENDLESS = PROGRAMS / "torch_endless.py"


@pytest.mark.slow
def test_stopped_rank_is_named_and_ended_under_torchrun() -> None:
    ended = torchrun(2, ENDLESS, "stop", env={"LVXATTN_TIMEOUT": "3"})
    assert not ended.timed_out
    assert ended.left == ()
    pid = int(dict(line.split() for line in ended.out.splitlines())["1"])
    assert f"rank 1 of the world (process {pid}) is stopped" in ended.err
    assert "Unable to shutdown process" not in ended.err  # torchrun did not have to wait for it


@pytest.mark.slow
def test_ranks_end_with_torchrun(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--nproc-per-node", "2", str(ENDLESS)]
    mark, out = uuid.uuid4().hex, tmp_path / "out"
    with (
        out.open("w") as file,
        subprocess.Popen(command, stdout=file, env=environment({**OUTSIDE, MARK: mark})) as process,
    ):
        try:
            assert until(lambda: out.read_text().count("\n") == 2, 120)
            process.kill()
            pids = [int(line.split()[1]) for line in out.read_text().splitlines()]
            assert until(lambda: all(map(gone, pids)))
        finally:
            process.kill()
            outlived(mark)

"""Let one rank of a process group fail, in each of many cases, and print how all ranks ended.

usage: torch_fault.py CASES

CASES is a JSON list of [P, RANK, HOW, PLACE, SCHEDULE, PASS]:

HOW         raise; kill; stop, and go on when all others have ended; or "mask raises".  With "again"
            after it the others catch what they get, and call once more before they raise it.
            "other order": the rank calls the backwards of two forwards the other way round
PLACE       "before" all ranks agree; "hop N begins", "computes" or "ends"; "a post" that refuses;
            of the other order, "one layout" or "two layouts"
SCHEDULE    lv-xattn; ring; or replicated, which has hop 0 only; of the other order, any
PASS        forward or backward

A rank is a fork of this process, so that PyTorch is imported once for all; from then on it is a
process like any other, and ends as Python ends.  Nobody but the package ends the other ranks.
"""

import gc
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lvxattn.torch_impl import Layout, cross_attention, exchange
from tests.programs.start import finish, start
from tests.torch_ranks import RANK, SIZE, STORE

TIMEOUT = 3.0  # of the groups, in seconds
PATIENCE = 60.0  # for one case
AT_ONCE = 6  # cases
Case = tuple[int, int, str, str, str, str]


class Rank:
    """One rank of a case, in a process of its own; it writes events to `folder`."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.P, self.number, self.how, self.place, self.schedule, self.which = case
        self.folder, self.armed = folder, False

    def run(self) -> None:
        """Attend until it fails."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        comm, _ = start(timeout=TIMEOUT)
        torch.manual_seed(comm.rank)
        shapes = (1, 4, 5 + comm.rank, 8), (1, 2, 9, 8), (1, 2, 9, 8)
        if self.schedule == "replicated":
            shapes = (1, 4, 5, 8), *shapes[1:]
        given = [torch.randn(shape, requires_grad=True) for shape in shapes]
        options: dict[str, Any] = {"schedule": self.schedule}
        if self.schedule == "replicated":
            options = {"queries": "replicated"}
        if self.how == "mask raises":
            options["mask"] = self.rule if comm.rank == self.number else causal
        if self.place not in ("before", "two layouts"):
            call = "forward and backward"
            options["layout"] = Layout.agree(*given, comm, **options, call=call)
        if self.how == "other order":
            self.both_ways(lambda: cross_attention(*given, comm, **options), comm.rank)
            finish(comm)
            print("reached the end")
            return
        out = cross_attention(*given, comm, **options)  # every rank has met its neighbours
        kept = [x.detach().clone() for x in (*given, out)]
        if comm.rank == self.number:
            self.prepare()
        try:
            if self.which == "forward":
                cross_attention(*given, comm, **options)
            else:
                out.sum().backward()
        except RuntimeError:
            assert all(x.equal(y) for x, y in zip(kept, (*given, out), strict=True))
            self.say(f"raised{comm.rank}", time.monotonic())
            if self.how.endswith("again"):
                self.once_more(lambda: cross_attention(*given, comm, **options))
            raise
        finish(comm)
        print("reached the end")

    def both_ways(self, attend: Any, rank: int) -> None:
        """Call two backwards, on one rank the last one first."""
        losses = [attend().sum() for _ in range(2)]
        self.say("failed", time.monotonic())
        try:
            for loss in losses[:: -1 if rank == self.number else 1]:
                loss.backward()
        except RuntimeError:
            self.say(f"raised{rank}", time.monotonic())
            raise

    def prepare(self) -> None:
        """Fail now, or prepare to fail later."""
        self.armed = True
        if self.how == "mask raises":
            return
        if self.place == "before":
            self.fail()
            return
        if self.place == "a post":
            torch.distributed.batch_isend_irecv = self.refuse
            return
        _, hop, moment = self.place.split()
        h = int(hop)
        if moment == "begins":  # its block has come
            follows = self.schedule == "lv-xattn" or self.which == "backward"
            number = 2 * h - 2 if follows else h  # from hop 2 on a result follows each
            self.fails_at(max(1, number), exchange.Rotation, "receive")
        elif moment == "computes":
            file = {"lv-xattn": "lv_xattn", "ring": "ring_attention"}.get(self.schedule, "")
            forward = self.which == "forward"
            name = "partial_attention" if forward else "block_attention_backward"
            before = 2 if forward and self.schedule == "ring" else 1  # ring begins with both parts
            module = import_module(f"lvxattn.torch_impl.{file or self.schedule}")
            self.fails_at(before + h, module, name)
        else:  # what it sends is on its way: my own block and each visitor but the last, results
            number = min(2 * h + 1, 2 * (self.P - 1))
            self.fails_at(number, exchange.Rotation, "start")

    def fails_at(self, number: int, where: Any, name: str) -> None:
        """Fail when a function has been called this number of times."""
        function, calls = getattr(where, name), itertools.count(1)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if next(calls) == number:
                self.fail()
            return result

        setattr(where, name, call)

    def fail(self) -> None:
        """Fail now."""
        self.say("failed", time.monotonic())
        if self.how == "raise":
            raise ValueError("broken on purpose")
        stops = signal.SIGSTOP if self.how.startswith("stop") else signal.SIGKILL
        os.kill(os.getpid(), stops)

    def refuse(self, ops: Any) -> Any:
        """Fail like a transport that accepts no message."""
        self.say("failed", time.monotonic())
        raise RuntimeError(f"the transport took none of {len(ops)} messages")

    def rule(self, b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        """A user's mask that raises."""
        if self.armed:
            self.say("failed", time.monotonic())
            raise ZeroDivisionError("of the user's own")
        return causal(b, h, q_index, kv_index)

    def once_more(self, attend: Any) -> None:
        """Use the failed group again, against the documentation."""
        begin = time.monotonic()
        try:
            attend()
            said = "nothing"
        except RuntimeError as error:
            said = str(error)
        self.say(f"again{os.environ[RANK]}", [time.monotonic() - begin, said])

    def say(self, name: str, what: Any) -> None:
        """Write an event."""
        (self.folder / name).write_text(json.dumps(what))


def causal(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
    """A causal mask."""
    return kv_index <= q_index


class Run:
    """The processes of a running case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.ended: dict[int, tuple[int, float]] = {}  # by rank: status, and when
        self.killed: list[int] = []
        self.pids = [self._fork(rank) for rank in range(case[0])]
        self.begin = time.monotonic()

    def _fork(self, rank: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        for fd, name in ((1, "out"), (2, "err")):
            file = os.open(self.folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, fd)
        os.environ.update({STORE: f"{self.folder}/store", RANK: str(rank), SIZE: str(self.case[0])})
        raise _Forked(Rank(self.case, self.folder))

    def look(self) -> bool:
        """Collect ended ranks; return whether all have ended."""
        left = [rank for rank in range(len(self.pids)) if rank not in self.ended]
        for rank in left:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
            elif time.monotonic() > self.begin + PATIENCE:
                self.killed.append(rank) if rank not in self.killed else None
                os.kill(self.pids[rank], signal.SIGKILL)
            elif left == [self.case[1]] and self.case[2].startswith("stop"):
                os.kill(self.pids[rank], signal.SIGCONT)
        return len(self.ended) == len(self.pids)

    def report(self) -> dict[str, Any]:
        """Return how every rank ended."""
        word = {
            file.name: json.loads(file.read_text())
            for pattern in ("failed", "raised*", "again*")
            for file in self.folder.glob(pattern)
        }
        ranks, failed = range(len(self.pids)), word["failed"]
        return {
            "status": [self.ended[rank][0] for rank in ranks],
            # Seconds since the one failed.
            "raised": [word.get(f"raised{rank}", failed) - failed for rank in ranks],
            "seconds": [self.ended[rank][1] - failed for rank in ranks],
            "out": [(self.folder / f"out{rank}").read_text() for rank in ranks],
            "err": [(self.folder / f"err{rank}").read_text() for rank in ranks],
            "killed": self.killed,
            "again": [word.get(f"again{rank}") for rank in ranks],
        }


class _Forked(Exception):  # noqa: N818 - not an error: how a fork leaves what the mother does
    """Raised in a fork, which continues as a rank."""


def main(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Run all cases, a few at a time, and return how they ended."""
    waiting, runs = list(enumerate(cases)), dict[int, Run]()
    running: dict[int, Run] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, case = waiting.pop(0)
            (folder / str(number)).mkdir()
            running[number] = runs[number] = Run(case, folder / str(number))
        running = {number: run for number, run in running.items() if not run.look()}
        time.sleep(0.01)
    return [runs[number].report() for number in range(len(cases))]


if __name__ == "__main__":
    place = tempfile.mkdtemp()
    gc.freeze()  # or every rank would spend a second at exit on collecting PyTorch's modules
    try:
        reports = main([tuple(case) for case in json.loads(sys.argv[1])], Path(place))
    except _Forked as forked:
        rank = forked.args[0]
    else:
        shutil.rmtree(place)
        print(json.dumps(reports))
        sys.exit()
    # At top level, and with nothing to be caught: what is raised ends the process as it would any.
    rank.run()

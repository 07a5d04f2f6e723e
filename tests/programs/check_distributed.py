"""Check a distributed function on the launcher's ranks.

usage: check_distributed.py '{"schedule": ..., ...}', options of `check_distributed` by name, for
our own function with a schedule, or "replicated" queries: that of mpi_impl, or under torchrun of
torch_impl.  "heads" gives every case so many times its heads, "cases" are instead of the suite's.
Or {"planted": {"fault": ...}, ...}, in PyTorch without gradients, or {"waits": true, ...}, or
{"holds": true, ...}: a function that leaves its groups in circles of references.  Rank 0 prints a
summary.
"""

import gc
import json
import os
import re
import sys
import weakref
from dataclasses import replace
from importlib import import_module
from typing import Any

from lvxattn.check import case_of, distributed, growth, suite_of
from lvxattn.check.growth import GROWTH
from tests.errors import says
from tests.planted_ranks import Planted

TORCH = "RANK" in os.environ  # torchrun's
ours: Any = import_module(f"lvxattn.{'torch_impl' if TORCH else 'mpi_impl'}")


class Schedule:
    """Our function with a schedule; cases that Ulysses rejects are unsupported."""

    def __init__(self, schedule: str) -> None:
        self.options: dict[str, Any] = {"schedule": schedule}

    def __call__(self, *given: Any, **options: Any) -> Any:
        if TORCH:  # whose backward is autograd's
            options["return_lse"] = True
        return self.supported(ours.cross_attention, *given, **options)

    def supported(self, function: Any, *given: Any, **options: Any) -> Any:
        try:
            return function(*given, **self.options, **options)
        except ValueError as error:
            if not re.search(says("schedule", "'ulysses'", "H_KV"), str(error)):
                raise
            raise NotImplementedError(str(error)) from None


class ScheduleOverMPI(Schedule):
    """With a backward of its own."""

    def backward(self, *given: Any, **options: Any) -> Any:
        return self.supported(ours.cross_attention_backward, *given, **options)


class Replicated:
    """Our function with replicated queries, with the interface for sharded ones."""

    def __call__(self, q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
        given = ours.unshard(q, comm), k, v, comm
        return tuple(self.mine(x, q, comm) for x in attend(*given, **options))

    def backward(
        self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, comm: Any, **options: Any
    ) -> Any:
        dout, all_q, out, lse = (ours.unshard(x, comm) for x in (dout, q, out, lse))
        if TORCH:
            import torch

            given = [x.detach().requires_grad_() for x in (all_q, k, v)]
            with torch.enable_grad():
                out, _ = attend(*given, comm, **options)
            dq, dk, dv = torch.autograd.grad(out, given, dout)
        else:
            dq, dk, dv = ours.cross_attention_backward(
                dout, all_q, k, v, out, lse, comm, queries="replicated", **options
            )
        return self.mine(dq, q, comm), dk, dv

    def mine(self, x: Any, q: Any, comm: Any) -> Any:
        """Return this rank's rows."""
        ranks: Any = comm
        if TORCH:
            from lvxattn.torch_impl.group import Group

            ranks = Group.of(comm)
        first = sum(ranks.allgather(q.shape[2])[: ranks.rank])
        return x[:, :, first : first + q.shape[2]]


def attend(*given: Any, **options: Any) -> Any:
    """Return out and lse of all queries."""
    options |= {"return_lse": True} if TORCH else {}
    return ours.cross_attention(*given, queries="replicated", **options)


def in_torch(planted: Any) -> Any:
    """Return a planted function for tensors and process groups."""
    import torch

    from lvxattn.torch_impl.group import Group

    def function(*given: Any, scale: float, mask: Any) -> Any:
        *arrays, mask = (x.numpy() if torch.is_tensor(x) else x for x in (*given[:3], mask))
        found = planted(*arrays, Group.of(given[3]), scale=scale, mask=mask)
        return tuple(map(torch.from_numpy, found))

    return function


def fail_on_rank_1(q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
    """Fail in PyTorch: rank 1 raises while the others wait for it."""
    import torch.distributed as dist

    if dist.get_rank(comm) == 1:
        raise ValueError("no such thing")
    dist.barrier(comm)
    return q


HELD: list[Any] = []


def hold_groups(q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
    """Fail, and leave the group in a circle of references."""
    HELD.append(weakref.ref(comm))
    circle = [comm]
    circle.append(circle)
    raise ValueError("no such thing")


wishes = json.loads(sys.argv[1])
names, heads = wishes.pop("cases", None), wishes.pop("heads", 1)
cases = suite_of("quick") if names is None else [case_of(name) for name in names]
wishes["cases"] = [replace(case, H=heads * case.H, H_KV=heads * case.H_KV) for case in cases]
growth.GROWTH = replace(GROWTH, H=heads * GROWTH.H, H_KV=heads * GROWTH.H_KV)
if "planted" in wishes:
    function: Any = Planted(**wishes.pop("planted"))
    if TORCH:
        function, wishes["backward"] = in_torch(function), False
elif wishes.pop("waits", False):
    function = fail_on_rank_1
elif wishes.pop("holds", False):
    function = hold_groups
    gc.disable()
else:
    schedule = wishes.pop("schedule")
    kind = Schedule if TORCH else ScheduleOverMPI
    function = Replicated() if schedule == "replicated" else kind(schedule)
report = distributed.check_distributed(function, **wishes)
if report is not None:
    summary = {
        "passed": report.passed,
        "failed": sorted({row.case for row in report.failed}),
        "failed_where": sorted({row.where for row in report.failed}),
        "statuses": sorted({row.status for row in report.rows}),
        "where": sorted({row.where for row in report.rows}),
        "results": sorted({verdict.name for row in report.rows for verdict in row.verdicts}),
        "rows": len(report.rows),
        "worst": report.worst_ratio,
        "seconds": report.seconds,
        "text": str(report),
        "groups": [len(HELD), sum(held() is not None for held in HELD)],
    }
    sys.stdout.write(json.dumps(summary) + "\n")

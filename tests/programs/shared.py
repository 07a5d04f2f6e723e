"""Checks that run_calls.py and torch_calls.py have in common."""

from functools import partial
from typing import Any

import numpy as np

from lvxattn.common.layout import shard
from lvxattn.plan import MACHINES
from tests import hidden
from tests.cases import WAYS, Case
from tests.judge import solve


def machine_of_rank_0_counts(comm: Any, implementation: Any) -> list[bool]:
    q, k = (shard(np.ones((2, 2, s, 4)), comm) for s in (40, 2))
    machines = [MACHINES["h100"], None, MACHINES["a30-8"]]
    machine = machines[comm.rank % 3]
    agree = partial(implementation.Layout.agree, q, k, k, comm, schedule="auto")
    layout, by_bytes = agree(machine=machine), agree(machine=machine if comm.rank else None)
    chosen = comm.allgather([layout.schedule, by_bytes.schedule])
    # Here latency takes the time; one rank sends nothing.
    wanted = ["gather", "ring"] if comm.size > 1 else chosen[0]
    return [chosen == [wanted] * comm.size, layout.machine == machines[0], not by_bytes.machine]


def hidden_rows_are_right(comm: Any, implementation: Any) -> list[bool]:
    return [
        right
        for schedule in WAYS
        for right in hidden.all_right(
            partial(solve, comm=comm, implementation=implementation, schedule=schedule),
            schedule,
            comm.size,
        )
    ]


def errors_grow_at_most_twofold(comm: Any, alone: Any, implementation: Any) -> list[bool]:
    """Compare with one rank, in the mean over the elements of a result, where |lse| is large."""
    verdicts = []
    for level in (-1e4, -900.0, 900.0, 1e4):
        problem = Case("large lse", H=4, S_Q=65, S_KV=601, dtype="float32", shift=level).make()
        together, single = (solve(problem, c, implementation) for c in (comm, alone))
        truth = problem.truth().results
        for name in together:
            many, one = (np.square(x[name] - truth[name]).mean() for x in (together, single))
            verdicts.append(many <= 2**2 * one)
    return verdicts

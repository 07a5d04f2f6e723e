"""Solve every case on the ranks of this run; rank 0 prints, as JSON, how far off each result is.

Arguments: the schedule, and n to pick every n-th case.  All ranks solve together, and each then
judges its share.
"""

import json
import sys
from typing import Any

import numpy as np

from lvxattn import reference
from lvxattn.common.validation import accumulator
from tests.cases import BF16, CASES, Problem
from tests.judge import ratio, solve, worst_ratios
from tests.naive import Array
from tests.programs.start import finish, start
from tests.tolerances import limits

comm, implementation = start()
schedule, every = sys.argv[1], int(sys.argv[2])


def judge(problem: Problem, results: dict[str, Array], again: dict[str, Array]) -> dict[str, Any]:
    """Return the errors over their limits, against the truth and against the reference."""
    case, truth = problem.case, problem.truth()
    limit = limits(case, truth, case.dtype, accumulator(case.dtype))
    by_reference = reference.run_ranks(
        comm.size, lambda c: solve(problem, c, reference, schedule=schedule)
    )[0]
    return {
        "truth": worst_ratios(problem, results, truth),
        "reference": {
            name: ratio(np.asarray(x, np.float64), by_reference[name], limit[name])
            for name, x in results.items()
        },
        "dtypes": {name: str(x.dtype) for name, x in results.items()},
        "same bits": all(x.tobytes() == again[name].tobytes() for name, x in results.items()),
    }


judged = {}
for number, case in enumerate((CASES + BF16)[::every]):
    problem = case.on(schedule, comm.size).make()
    results = solve(problem, comm, implementation, schedule=schedule)
    again = solve(problem, comm, implementation, schedule=schedule, reuse_layout=True)
    if number % comm.size == comm.rank:
        judged[case.name] = judge(problem, results, again)
parts = comm.allgather(judged)
if comm.rank == 0:
    json.dump({name: part[name] for part in parts for name in part}, sys.stdout)
finish(comm)

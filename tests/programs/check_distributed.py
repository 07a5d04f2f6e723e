"""Check a distributed function on the ranks that there are.

usage: check_distributed.py '{"fn": "module:function", ...}', options of `check_distributed` by
name; "backward" is another module:function, "options" are given to both, "cases" are instead of the
suite's.  Or {"planted": {"fault": ...}, ...}, or
{"waits": true, ...}.  Rank 0 prints a summary.
"""

import json
import sys
from functools import partial
from importlib import import_module
from typing import Any

from lvxattn.reference.check import case_of, distributed
from tests.planted_ranks import Planted


def found(name: str, options: dict[str, Any]) -> Any:
    module, _, path = name.partition(":")
    thing = getattr(import_module(module), path)
    return partial(thing, **options) if options else thing


def alone(q: Any, k: Any, v: Any, comm: Any, **options: Any) -> Any:
    """Fail in PyTorch: rank 1 raises while the others wait for it."""
    import torch.distributed as dist

    if dist.get_rank(comm) == 1:
        raise ValueError("no such thing")
    dist.barrier(comm)
    return q


wishes = json.loads(sys.argv[1])
given = wishes.pop("options", {})
names = wishes.pop("cases", None)
if names is not None:
    distributed.suite_of = lambda _: [case_of(name) for name in names]  # type: ignore[assignment]
if "planted" in wishes:
    function: Any = Planted(**wishes.pop("planted"))
elif wishes.pop("waits", False):
    function = alone
else:
    function = found(wishes.pop("fn"), given)
    if "backward" in wishes:
        wishes["backward"] = found(wishes["backward"], {"schedule": given["schedule"]})
report = distributed.check_distributed(function, **wishes)
if report is not None:
    summary = {
        "passed": report.passed,
        "failed": sorted({row.case for row in report.failed}),
        "statuses": sorted({row.status for row in report.rows}),
        "where": sorted({row.where for row in report.rows}),
        "results": sorted({verdict.name for row in report.rows for verdict in row.verdicts}),
        "rows": len(report.rows),
        "worst": report.worst_ratio,
        "seconds": report.seconds,
        "text": str(report),
    }
    sys.stdout.write(json.dumps(summary) + "\n")

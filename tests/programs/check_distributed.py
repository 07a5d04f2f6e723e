"""Check a distributed function on the ranks that there are.

usage: check_distributed.py '{"fn": "module:function", ...}', options of `check_distributed` by
name; "backward" is another module:function, and "options" are given to both.  Rank 0 prints a
summary.
"""

import json
import sys
from functools import partial
from importlib import import_module
from typing import Any

from lvxattn.reference.check.distributed import check_distributed


def found(name: str, options: dict[str, Any]) -> Any:
    module, _, path = name.partition(":")
    thing = getattr(import_module(module), path)
    return partial(thing, **options) if options else thing


wishes = json.loads(sys.argv[1])
given = wishes.pop("options", {})
planted = wishes.pop("planted", None)
if planted is not None:
    from tests.planted_ranks import Planted

    function = Planted(planted)
else:
    function = found(wishes.pop("fn"), given)
    if "backward" in wishes:
        wishes["backward"] = found(wishes["backward"], {"schedule": given["schedule"]})
report = check_distributed(function, **wishes)
if report is not None:
    summary = {
        "passed": report.passed,
        "failed": sorted({row.case for row in report.failed}),
        "statuses": sorted({row.status for row in report.rows}),
        "where": sorted({row.where for row in report.rows}),
        "rows": len(report.rows),
        "worst": report.worst_ratio,
        "seconds": report.seconds,
        "text": str(report),
    }
    sys.stdout.write(json.dumps(summary) + "\n")

"""A suite on a function."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from lvxattn.check.command.arguments import framework_in, functions_in, look_at_file
from lvxattn.check.command.ranks import allgather
from lvxattn.check.report import Report
from lvxattn.check.suite import check
from lvxattn.cli.arguments import UsageError


def check_function(options: Namespace) -> int:
    """Check the function that is named, and say what was found.

    With ``--distributed`` collective: every rank calls this.

    Returns
    -------
    int
        0, or 1 if something failed; the same on all ranks.

    Raises
    ------
    UsageError
        The same on all ranks.
    """
    if not options.distributed:
        fn, arguments = _prepared(options)
        return _told(check(fn, **arguments), options)
    problem = None
    try:
        fn, arguments = _prepared(options)
    except UsageError as error:
        problem = str(error)
    problems = [text for text in allgather(problem, options.device) if text]
    if problems:
        raise UsageError(problems[0])

    # Looked up now, so that a test can put another in its place.
    from lvxattn.check.distributed import check_distributed

    report = check_distributed(fn, **arguments, told=lambda report: _told(report, options))
    status = 0 if report is None else _told(report, options)
    return int(max(allgather(status, options.device)))


def _prepared(options: Namespace) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function and `check`'s arguments, once all that was given has been looked at."""
    framework_in(options)
    look_at_file(options.json, "--json")
    fn, backward = functions_in(options)
    return fn, {
        "suite": options.suite or "quick",
        "dtypes": options.dtypes,
        "backward": backward,
        "framework": options.framework,
        "device": options.device,
        "seeds": options.seeds or 1,
        "time_limit": options.time_limit or 30.0,
    }


def _told(report: Report, options: Namespace) -> int:
    if options.json == "-":
        print(report.as_json(), flush=True)
    elif options.json:
        report.to_json(options.json)
    if not options.quiet and options.json != "-":
        print(report, flush=True)
    return 0 if report.passed else 1

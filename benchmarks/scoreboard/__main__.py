"""Hold published attention functions against the oracle, and write docs/scoreboard.md.

    python -m benchmarks.scoreboard [NAME ...] [--suite full] [--cache DIR] [--fresh | --remove]

Each package is installed, in the version that `packages.toml` pins, into a virtual environment of
its own in the cache folder; that takes a network, minutes, and 10 GB for all. With names, these
entries only are run, the others keep their rows, and full reports are printed.

The exit status is 0 if everything named could be run, whatever was found; 1 if something could not
be installed or gave no report; 2 for an invalid command line.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from benchmarks.scoreboard.entries import PINNED, chosen, entries
from benchmarks.scoreboard.environments import ROOT
from benchmarks.scoreboard.outcome import ABSENT, SILENT
from benchmarks.scoreboard.running import checked
from benchmarks.scoreboard.table import Json, page
from lvxattn.cli.arguments import positive
from lvxattn.common.new_file import write_file

RESULTS = ROOT / "benchmarks" / "results" / "scoreboard.json"
PAGE = ROOT / "docs" / "scoreboard.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvxattn-scoreboard"


def main(argv: list[str] | None = None) -> int:
    """Run entries, store outcomes after each, write the page; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoreboard", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="an entry, or how some begin")
    parser.add_argument("--list", action="store_true", help="list the entries")
    parser.add_argument("--suite", choices=("quick", "full"), default="quick")
    parser.add_argument("--ranks", type=positive, metavar="P", help="only on P ranks")
    parser.add_argument(
        "--cache",
        type=Path,
        default=CACHE,
        metavar="DIR",
        help="environments; default: %(default)s",
    )
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    parser.add_argument("--remove", action="store_true", help="remove each environment after use")
    parser.add_argument(
        "--seconds", type=positive, default=900, help="for each check; default: %(default)s"
    )
    parser.add_argument(
        "--packages", type=Path, default=PINNED, metavar="FILE", help="another list"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument(
        "--here", action="store_true", help="run with this Python's packages, and install nothing"
    )
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running check ends, too
    try:
        every = entries(options.packages)
        wanted = chosen(options.names, every)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.list:
        for entry in every:
            print(f"{entry.name:32} {' '.join(map(str, entry.ranks)):8} {entry.what}")
        return 0
    if options.fresh and not options.here:
        for name in {entry.environment for entry in wanted}:
            shutil.rmtree(options.cache / "environments" / name, ignore_errors=True)
    status = 0
    for n, entry in enumerate(wanted):
        for ranks in entry.ranks or (0,):
            if options.ranks not in (None, ranks):
                continue
            outcome, output = checked(
                entry,
                ranks,
                suite=options.suite,
                cache=options.cache,
                seconds=options.seconds,
                python=Path(sys.executable) if options.here else None,
            )
            if options.names:
                print(output)
            print(f"{entry.name} {ranks or ''}: {outcome.result} {outcome.counts}", flush=True)
            status |= outcome.result in (ABSENT, SILENT)
            _store(options, f"{entry.name} {ranks}", outcome.as_json(), [x.name for x in every])
        later = {entry.environment for entry in wanted[n + 1 :]}
        if options.remove and not options.here and entry.environment not in later:
            shutil.rmtree(options.cache / "environments" / entry.environment, ignore_errors=True)
    return status


def _store(options: argparse.Namespace, key: str, outcome: Json, order: list[str]) -> None:
    """Add an outcome to the stored ones, which another run may have changed; write the page.

    Outcomes are in the order of the entries; what is no entry any more is dropped.
    """
    found: Json = json.loads(options.results.read_text()) if options.results.exists() else {}
    kept = found.get("outcomes", {}) | {key: outcome}
    kept = {name: x for name, x in kept.items() if x["name"] in order}
    kept = dict(sorted(kept.items(), key=lambda item: (order.index(item[1]["name"]), item[0])))
    write_file(options.results, json.dumps(found | {"outcomes": kept}, indent=1) + "\n")
    write_file(options.page, page([*kept.values()], found.get("seconds")))


if __name__ == "__main__":
    sys.exit(main())

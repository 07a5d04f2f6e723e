r"""Print a table of the files that the tasks of array.sbatch have written into the folder sizes.

    sbatch --dependency=afterok:NUMBER --kill-on-invalid-dep=yes \
      --wrap "python3 examples/cluster/table.py"

It needs Python alone, and runs without Slurm, too.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print a line for each file, by the number of keys."""
    files = [*Path("sizes").glob("*.json")]
    if not files:
        sys.exit(
            "table.py: expected sizes/*.json, found none: run array.sbatch in this folder first"
        )
    print("| visual tokens | ranks | hosts | forward, ms | sent, MB | check |")
    print("|--:|--:|--:|--:|--:|---|")
    for _, line in sorted(map(line_of, files)):
        print(line)


def line_of(file: Path) -> tuple[int, str]:
    """Return the number of keys of a run, and its line."""
    try:
        run = json.loads(file.read_text())
        totals, checks = run["totals"], [check["passed"] for check in run["checks"]]
        keys, ranks, hosts = (totals[name] for name in ("keys", "ranks", "hosts"))
        forward, sent = 1e3 * totals["forward"], totals["bytes"] / 1e6
    except (ValueError, LookupError, TypeError, OSError) as error:
        sys.exit(f"table.py: {file}: expected what run --json writes, got {error!r}")
    passed = "FAILED" if not all(checks) else "passed" if checks else "not checked"
    return keys, f"| {keys:,} | {ranks} | {hosts} | {forward:.1f} | {sent:.2f} | {passed} |"


if __name__ == "__main__":
    main()

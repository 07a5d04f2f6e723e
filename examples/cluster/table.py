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
    runs = [json.loads(file.read_text()) for file in Path("sizes").glob("*.json")]
    if not runs:
        sys.exit(
            "table.py: expected sizes/*.json, found none: run array.sbatch in this folder first"
        )
    print("| visual tokens | ranks | hosts | forward, ms | sent, MB | check |")
    print("|--:|--:|--:|--:|--:|---|")
    for run in sorted(runs, key=lambda run: run["totals"]["keys"]):
        totals, passed = run["totals"], all(check["passed"] for check in run["checks"])
        print(
            f"| {totals['keys']:,} | {totals['ranks']} | {totals['hosts']} "
            f"| {1e3 * totals['forward']:.1f} | {totals['bytes'] / 1e6:.2f} "
            f"| {'passed' if passed else 'FAILED'} |"
        )


if __name__ == "__main__":
    main()

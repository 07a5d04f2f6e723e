"""What every step came to, as a table in a file."""

import os
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = "step", "frames", "loss", "accuracy", "held_out", "seconds"

Row = list[float | None]


@dataclass
class Curve:
    """One row for each step.

    Attributes
    ----------
    rows : list
        ``step``, counted from 1; ``frames`` of its clips; ``loss`` in nats and ``accuracy`` before
        the step, over all ranks' questions; ``held_out``, accuracy after it on images that are not
        trained on, where it was looked at; ``seconds`` that all steps and looks so far took.
    """

    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.rows)

    def add(self, frames: int, loss: float, accuracy: float, seconds: float) -> None:
        """Add a step."""
        self.rows.append([len(self.rows) + 1, frames, loss, accuracy, None, seconds])

    def looked(self, held_out: float, seconds: float) -> None:
        """Add to the last step what a look at held-out images showed, and how long it took."""
        self.rows[-1][4:] = held_out, self.seconds + seconds

    def column(self, name: str) -> list[float | None]:
        """Return one column."""
        return [row[COLUMNS.index(name)] for row in self.rows]

    @property
    def seconds(self) -> float:
        """How long all steps so far took."""
        return float(self.rows[-1][5] or 0.0) if self.rows else 0.0

    def write(self, path: Path) -> None:
        """Write it as CSV, all or nothing.

        Raises
        ------
        OSError
        """
        # repr gives every digit: float64 curves are compared by what is written here.
        lines = [",".join(COLUMNS)]
        lines += [",".join("" if x is None else repr(x) for x in row) for row in self.rows]
        new = path.with_suffix(".csv.new")
        new.write_text("\n".join(lines) + "\n")
        os.replace(new, path)

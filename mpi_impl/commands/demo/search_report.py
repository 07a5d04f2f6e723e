"""The text of the demo, at most 100 columns wide: its progress, its problem, its result."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from lvxattn.mpi_impl.commands.demo.answers import AMBIGUOUS, FOUND, WRONG, Answers, Check
from lvxattn.mpi_impl.commands.demo.patches import PATCH, D
from lvxattn.mpi_impl.commands.demo.sources import Source

_EXAMPLES = 12


@dataclass(frozen=True)
class Costs:
    """The work of one rank.

    Attributes
    ----------
    frames, queries, tokens : int
        Numbers that it holds.
    messages, sent : int
        Messages and bytes that it sent during the attention.
    reading, computing, waiting : float
        Seconds: frames to descriptors, then the attention's two parts.
    """

    frames: int
    queries: int
    tokens: int
    messages: int
    sent: int
    reading: float
    computing: float
    waiting: float


class Progress:
    """Progress on rank 0: one updating line on a terminal, otherwise one line per stage.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._speaks = comm.rank == 0
        # Under mpiexec stdout is a pipe even if it ends at a terminal: the caller can tell.
        asked = os.environ.get("LVXATTN_PROGRESS")
        self._updates = self._speaks and (asked == "line" if asked else sys.stdout.isatty())
        self._started = self._shown = time.perf_counter()
        self._stage = ""

    def start(self, stage: str) -> None:
        """Begin a stage, such as ``"reading frames"``."""
        self._stage, self._started, self._shown = stage, time.perf_counter(), 0.0
        self._rewrite(f"{stage} ...")

    def update(self, done: int, total: int) -> None:
        """Show the stage's progress, at most ten times a second."""
        now = time.perf_counter()
        if now - self._shown > 0.1:
            self._shown = now
            bar = "#" * (24 * done // max(total, 1))
            self._rewrite(f"{self._stage}  [{bar:<24}] {done:,}/{total:,}")

    def finish(self) -> None:
        """End the stage."""
        self.clear()
        if self._speaks and not self._updates:
            print(f"{self._stage} ... {time.perf_counter() - self._started:.1f} s", flush=True)

    def clear(self) -> None:
        """Clear the updating line, so that an error is on a line of its own."""
        self._rewrite("")

    def _rewrite(self, text: str) -> None:
        if self._updates:
            print(f"\r\033[K{text}", end="", flush=True)


def print_problem(source: Source, ranks: int, S_Q: int, S_KV: int, scale: float) -> None:
    """Print the problem's sizes."""
    grid = f"{source.rows} x {source.cols} patches of {PATCH} x {PATCH} pixels"
    print(f"""
LV-XAttn video search
  video     {source.title}
  frames    {source.frames:,} of {grid}: {S_KV:,} visual tokens
  ranks     {ranks}, each with its own frames; each searches for patches that others hold
  shapes    q (1, 1, {S_Q}, {D})   k (1, 1, {S_KV}, {D})   v (1, 1, {S_KV}, 3)   float32
  scale     {scale:g}: the softmax picks one place, unless several look alike
""")


def print_result(
    answers: Answers, verdicts: Sequence[str], checks: Sequence[Check], costs: Sequence[Costs]
) -> None:
    """Print some answers, the checks, and the costs."""
    _print_answers(answers, verdicts)
    _print_checks(checks)
    _print_costs(costs)


def _print_answers(answers: Answers, verdicts: Sequence[str]) -> None:
    print("      true place       found at                           weight at")
    print("  frame row  col  frame row  col  asked by   held by   the true place")
    for n in _examples(verdicts):
        found = np.rint(answers.out[n]).astype(int)
        ranks = f"rank {answers.asker[n]:<6}rank {answers.holder[n]:<6}"
        print(
            f"{_place(answers.truth[n])}{_place(found)}  {ranks}{answers.weight[n]:>12.4f}  "
            f"{verdicts[n]}"
        )
    certain, ambiguous, wrong = (verdicts.count(verdict) for verdict in (FOUND, AMBIGUOUS, WRONG))
    print(
        f"\n  found {certain} of {len(verdicts)}"
        + f"; {ambiguous} ambiguous: several places look alike" * bool(ambiguous)
        + f"; {wrong} WRONG" * bool(wrong)
        + "\n"
    )


def _examples(verdicts: Sequence[str]) -> list[int]:
    """Return indices spread evenly over the answers, with at least one of each verdict."""
    picked = {n * len(verdicts) // _EXAMPLES for n in range(_EXAMPLES)}
    picked |= {verdicts.index(verdict) for verdict in set(verdicts)}
    return sorted(picked)


def _place(place: NDArray[np.int64]) -> str:
    frame, row, col = place
    return f"{frame:>7}{row:>4}{col:>5}"


def _print_checks(checks: Sequence[Check]) -> None:
    print("  check                                   measured  allowed")
    for check in checks:
        numbers = f"{check.measured:>10.2g}{check.allowed:>9.2g}"
        verdict = "ok  " if check.passed else "FAIL"
        print(f"  {check.name:<38}{numbers}  {verdict} {check.reason}")
    print()


def _print_costs(costs: Sequence[Costs]) -> None:
    print("  rank  frames   tokens  queries  messages     sent   reading  computing   waiting")
    for rank, cost in enumerate(costs):
        print(
            f"  {rank:>4}{cost.frames:>8,}{cost.tokens:>9,}{cost.queries:>9,}{cost.messages:>10}"
            f"{_bytes(cost.sent):>9}{cost.reading:>8.2f} s{cost.computing:>9.2f} s"
            f"{cost.waiting:>8.2f} s"
        )
    sent = sum(cost.sent for cost in costs)
    ring = (len(costs) - 1) * sum(cost.tokens for cost in costs) * (D + 3) * 4
    if sent:
        print(f"""
  sent by LV-XAttn in all            {_bytes(sent):>8}    measured: queries and partial results
  sent by Ring Attention in all      {_bytes(ring):>8}    (P - 1) hops of all keys and values
  ratio                              {ring / sent:>7.0f}x
""")
    else:
        print("\n  one rank: nothing is sent\n")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"

"""How much more every schedule sends than the lower bound: the tables of ``docs/lower-bound.md``.

    python benchmarks/lower_bound.py

Bytes are the plan's, of the busiest rank, of a forward and a backward of one layer in bfloat16.
"""

from math import gcd

from lvxattn.common.handshake import SCHEDULES
from lvxattn.common.layout import Layout
from lvxattn.common.wire import ITEMSIZE
from lvxattn.draw.bars import format_bytes
from lvxattn.plan import MODELS, PROBLEMS, candidates, lower_bound, planned
from lvxattn.plan.bound import row_and_key
from lvxattn.plan.models import Sizes

TEXT, FRAMES, RANKS = 2048, 1200, 8
PASSES = (False, True)


def presets() -> str:
    """Return the table of the presets."""
    shapes = {name: model.shapes(TEXT, FRAMES) for name, model in MODELS.items()}
    shapes |= {name: problem.shapes() for name, problem in PROBLEMS.items()}
    return _table("model", [(f"`{name}`", q, k, RANKS) for name, (q, k) in shapes.items()])


def sweep() -> str:
    """Return the table over ranks, lengths and heads of 128."""
    rows = []
    for P in (16, 64):
        for S_Q, S_KV in ((65536, 65536), (16384, 65536), (1024, 65536), (16384, 1024)):
            for H, H_KV in ((1, 1), (32, 8), (64, 64)):
                q, k = (1, H, S_Q, 128), (1, H_KV, S_KV, 128)
                rows.append((f"{P} | {S_Q:,} | {S_KV:,} | {H}/{H_KV}", q, k, P))
    return _table("P | S_Q | S_KV | heads", rows)


def teams(layout: Layout) -> float:
    """Return the bytes that a rank would send if heads were cut first, and a grid came after.

    No schedule here does that.  As many teams as divide the groups of heads take whole groups, and
    the ranks of a team are a grid: the best of all such numbers, where shares are even.
    """
    groups, P = layout.B * layout.H_KV, layout.size
    x1, y1 = layout.H // layout.H_KV * layout.S_Q, layout.S_KV
    costs = [row_and_key(layout, backward) for backward in PASSES]
    row, key = (sum(cost) for cost in zip(*costs, strict=True))
    row += ITEMSIZE[layout.accumulator]  # partial results have two numbers beside out, not one
    each = divisors(gcd(groups, P))
    return min(
        groups / n * (row * x1 * (1 / b - 1 / P) + key * y1 * (b * n / P - 1 / P))
        for n in each
        for b in divisors(P // n)
    )


def divisors(n: int) -> list[int]:
    """Return all divisors of n."""
    return [x for x in range(1, n + 1) if n % x == 0]


def _table(keys: str, rows: list[tuple[str, Sizes, Sizes, int]]) -> str:
    columns = f"{keys} | least | {' | '.join(SCHEDULES)} | heads, then grid"
    lines = [f"| {columns} |", f"|{'---|' * (1 + columns.count('|'))}"]
    for title, q, k, P in rows:
        layout = planned(q, k, P)
        least = sum(lower_bound(layout, backward=backward) for backward in PASSES)
        found = {c.schedule: c for c in candidates(layout)}
        cells = []
        for schedule in SCHEDULES:
            c = found[schedule]
            grid = f" ({c.grid[0]}x{c.grid[1]})" if c.grid else ""
            cells.append("-" if c.refused else f"{_ratio(c.nbytes / least)}{grid}")
        cells.append(_ratio(teams(layout) / least))
        lines.append(f"| {title} | {format_bytes(least, '.1f')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:,.0f}"


if __name__ == "__main__":
    print(presets(), sweep(), sep="\n\n")

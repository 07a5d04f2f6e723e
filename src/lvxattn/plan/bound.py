"""The fewest bytes that some rank must send, whoever computes what.

What any schedule is given: a rank holds its share of every head's queries, and of every key-value
head's keys and values, and no more; results and gradients end where their arguments are.  What it
may choose: which rank works on which pair of a query and a key.  Assumed:

- Every rank works on as many pairs.  (Otherwise the bound is on what the rank that does most
  receives and sends for it.)
- A pair is one rank's: scores are not split along D, nor probabilities sent.  No pair is masked.
- Inputs travel in their dtype; partial results and gradients, merged or not, in the accumulator
  dtype.  Nothing is kept from the forward for the backward.

Query heads that share a key-value head, of one batch entry, are a group; a row is one query of one
head.  A rank that meets X rows and y keys of a group works on at most X y of its pairs.  Its own x0
rows and y0 keys are there; any other row costs `row` bytes, since the query has to come and the
partial result to leave, and any other key costs `key` bytes:

    forward    row = q, out, lse                      key = k, v
    backward   row = q, dout, lse, delta and dq       key = k, v and dk, dv

Whatever comes was sent by some rank, so that the mean over ranks of what is sent is the mean of

    sum over groups of  row (X - x0) + key (y - y0),   where  sum over groups of X y  >=  pairs / P

and the busiest rank sends at least that.  The least of it is known.  Where all rows of a group cost
less than a rank's own keys (row x1 <= key y0), so that no other key ever pays, the rows come:
that is LV-XAttn, and the reverse is Ring Attention.  Elsewhere a group's cost is a concave function
of its pairs: one side grows alone, then both along the square root, then the other side alone.  A
sum of concave functions is least at the ends, so that a rank had best take whole groups, as Ulysses
does, its own share of all others, and a part of one: if there is but one group, this is the grid.
"""

from math import sqrt

from lvxattn.common.layout import Layout
from lvxattn.common.wire import ITEMSIZE


def lower_bound(layout: Layout, *, backward: bool = False) -> float:
    """Return the least number of bytes that the busiest rank sends in a pass.  Not collective.

    Parameters
    ----------
    layout : Layout
        Its schedule and masks, and that a side is replicated, are ignored.  Where shares differ,
        all are taken to be as large as the largest: a rank is never better off with less.
    backward : bool

    Returns
    -------
    float

    Examples
    --------
    A few text tokens attend to a long video.  LV-XAttn sends 2 numbers with a row of ``out``, the
    bound has 1:

    >>> from lvxattn.plan import candidates, planned
    >>> layout = planned((1, 8, 64, 64), (1, 8, 65536, 64), P=4)
    >>> bound = sum(lower_bound(layout, backward=backward) for backward in (False, True))
    >>> candidates(layout)[0].nbytes - bound == 4 * 8 * (64 - 16)
    True
    """
    row, key = row_and_key(layout, backward)
    group = layout.H // layout.H_KV
    x0, x1 = group * max(layout.s_q), group * layout.S_Q
    y0, y1 = max(layout.s_kv), layout.S_KV
    groups = layout.B * layout.H_KV
    more = groups * (x1 * y1 / layout.size - x0 * y0)  # pairs beyond those of the own share
    if more <= 0:
        return 0.0
    if row * x1 <= key * y0:
        return row * more / y0
    if key * y1 <= row * x0:
        return key * more / x0

    def cost(pairs: float) -> float:
        x = min(max(sqrt(pairs * key / row), x0, pairs / y1), x1, pairs / y0)
        return row * (x - x0) + key * (pairs / x - y0)

    whole, rest = divmod(more, x1 * y1 - x0 * y0)
    return whole * cost(x1 * y1) + cost(x0 * y0 + rest)


def row_and_key(layout: Layout, backward: bool) -> tuple[int, int]:
    """Return the bytes that another rank's row costs, and another rank's key."""
    narrow, wide = ITEMSIZE[layout.dtype], ITEMSIZE[layout.accumulator]
    D, D_V = layout.D, layout.D_V
    if backward:
        return (D + D_V) * narrow + (2 + D) * wide, (D + D_V) * (narrow + wide)
    return D * narrow + (D_V + 1) * wide, (D + D_V) * narrow

"""The time that recording a timeline adds to passes.

    mpiexec -n 2 python -m mpi4py benchmarks/tracing.py [--rounds N] [--quick]

Forward and backward passes with a `Meter`, with a `Timeline` and with a `Meter` again take turns,
in an order that changes from round to round.  Ratios are taken within a round, so that other load
affects both alike; the result is the median over rounds.  The ratio of the two meters shows the
noise.
"""

from statistics import median, quantiles
from time import perf_counter

import numpy as np
from bench import goal_of, parser_for
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from lvxattn.common.timeline import Timeline
from lvxattn.mpi_impl import Layout, Meter, cross_attention, cross_attention_backward

GOAL = 1.03
S_Q, S_KV, H, D = 512, 16384, 8, 64
KINDS = {"meter": Meter, "timeline": Timeline, "meter again": Meter}


def main() -> None:
    """Take turns, and print the median ratios."""
    parser = parser_for(__doc__, "5 rounds")
    parser.add_argument("--rounds", type=int, default=40, help="2 or more")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.rank)
    tall, wide = ((1, H, S // comm.size, D) for S in (S_Q, S_KV))
    q, k, v, dout = (rng.standard_normal(x, dtype=np.float32) for x in (tall, wide, wide, tall))
    layout = Layout.agree(q, k, v, comm)

    def turn(kind: str) -> float:
        """Return the seconds of the slowest rank.  Collective."""
        meter = KINDS[kind]()
        comm.Barrier()
        start = perf_counter()
        out, lse = cross_attention(q, k, v, comm, layout=layout, meter=meter)
        cross_attention_backward(dout, q, k, v, out, lse, comm, layout=layout, meter=meter)
        return float(comm.allreduce(perf_counter() - start, MPI.MAX))

    with threadpool_limits(1):
        turn("meter")
        rounds = []
        for n in range(5 if options.quick else options.rounds):
            order = np.roll(list(KINDS), n).tolist()
            rounds.append({kind: turn(kind) for kind in order})
    if comm.rank == 0:
        print(f"{comm.size} ranks, {S_Q} queries, {S_KV} keys, forward and backward: "
              f"{median(r['meter'] for r in rounds):.3f} s")  # fmt: skip
        for kind in ("timeline", "meter again"):
            ratios = [r[kind] / r["meter"] for r in rounds]
            low, _, high = quantiles(ratios, n=4)
            goal = f", goal {GOAL:.2f}{goal_of(options.quick)}" if kind == "timeline" else ""
            print(f"  {kind:<12} over meter {median(ratios):.4f}, quartiles {low:.3f} to {high:.3f}"
                  f"{goal}")  # fmt: skip


if __name__ == "__main__":
    main()

"""Block attention on one core, relative to sgemm on that core at the same operand sizes.

    OPENBLAS_NUM_THREADS=1 python benchmarks/block_attention.py [--json FILE] [--quick]

The products q k^T and p v are timed as two whole matrix products and nothing else; block attention
does the same products tile by tile, with softmax and merging.  Both take turns in one run, so that
the ratio holds on a noisy machine.
"""

from statistics import median

import numpy as np
from bench import goal_of, parser_for, seconds, write_json
from threadpoolctl import threadpool_limits

from lvxattn.mpi_impl import block_attention, block_attention_backward

GOAL = 0.8  # at D = 128, S_Q = 512, S_KV = 32,768, forward
SHAPES = [(128, 512, 32768), (64, 512, 32768), (128, 128, 32768), (64, 16, 32768)]
REPEAT = 7


def main() -> None:
    """Print, and on request store, the ratio for several shapes."""
    options = parser_for(__doc__, "an eighth of the keys", "json").parse_args()
    rows = []
    with threadpool_limits(1):
        for D, s_q, s_kv in SHAPES:
            rows.append(compare(D, s_q, s_kv // 8 if options.quick else s_kv))
            print(
                "D {D:4}  s_q {s_q:4}  s_kv {s_kv:6}  sgemm {sgemm:6.1f} GFLOP/s  "
                "forward {forward:.2f} of it  backward {backward:.2f}".format(**rows[-1])
            )
    of = goal_of(options.quick).replace(" of", ", of", 1)
    print(f"goal at the first shape, forward{of}: {GOAL}")
    write_json(options.json, {"goal": GOAL, "rows": rows})


def compare(D: int, s_q: int, s_kv: int) -> dict[str, float]:
    """Return sgemm's rate in GFLOP/s, and block attention's fraction of it, medians."""
    rng = np.random.default_rng(0)
    q, dout = (rng.standard_normal((1, 1, s_q, D), dtype=np.float32) for _ in range(2))
    k, v = (rng.standard_normal((1, 1, s_kv, D), dtype=np.float32) for _ in range(2))
    p, out = np.empty((s_q, s_kv), np.float32), np.empty((s_q, D), np.float32)
    dk, dv, lse = np.zeros_like(k), np.zeros_like(v), np.zeros((1, 1, s_q), np.float32)
    sgemm, forward, backward = [], [], []
    for _ in range(REPEAT + 1):
        scores = seconds(lambda: np.matmul(q[0, 0], k[0, 0].T, out=p))
        values = seconds(lambda: np.matmul(p, v[0, 0], out=out))
        keys = seconds(lambda: np.matmul(p.T, q[0, 0], out=dk[0, 0]))
        sgemm.append(4 * s_q * s_kv * D / (scores + values) / 1e9)
        run = seconds(lambda: block_attention(q, k, v, scale=D**-0.5))
        forward.append((scores + values) / run)
        run = seconds(
            lambda: block_attention_backward(dout, q, k, v, lse + 20, lse, dk, dv, scale=D**-0.5)
        )
        backward.append((2 * scores + values + 2 * keys) / run)
    names = ("sgemm", "forward", "backward")
    medians = {n: median(x[1:]) for n, x in zip(names, (sgemm, forward, backward), strict=True)}
    return {"D": D, "s_q": s_q, "s_kv": s_kv, **medians}


if __name__ == "__main__":
    main()

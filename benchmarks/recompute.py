"""Recomputation of keys and values in the backward: bytes saved, and time.

    python benchmarks/recompute.py [--json FILE] [--threads N] [--quick]

Layers of cross-attention with 4 query heads to a key-value head, S_Q = E and S_KV = 16 S_Q, all
reading the same features, in one process and fp32.  Bytes between forward and backward are counted,
storage by storage.  Steps (forward and backward) with and without recomputation take turns; the
result is the median ratio of such pairs.
"""

import os
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from activations import Layers, peak_bytes, saved_bytes
from bench import goal_of, parser_for, take_turns, write_json
from torch import Tensor

MEMORY_GOAL, TIME_GOAL = 0.40, 1.08
LAYERS, HEADS_TO_ONE = 8, 4
PAIRS, QUICK_PAIRS = 9, 2


def main() -> None:
    """Print, and on request store, bytes and times."""
    parser = parser_for(__doc__, f"E = 256 only, {QUICK_PAIRS} pairs", "json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, load = [], os.getloadavg()[0]
    widths = [(256, False)] if options.quick else [(256, False), (256, True), (512, False)]
    for E, frozen in widths:
        rows.append(compare(E, frozen, QUICK_PAIRS if options.quick else PAIRS))
        show(rows[-1])
    print(
        f"goals{goal_of(options.quick)}: saved at most {MEMORY_GOAL:.0%}, time at most {TIME_GOAL}"
    )
    stored = {"torch": torch.__version__, "threads": options.threads}
    stored |= {"load": [load, os.getloadavg()[0]]}
    stored |= {"memory goal": MEMORY_GOAL, "time goal": TIME_GOAL, "layers": LAYERS}
    write_json(options.json, {**stored, "rows": rows})


def compare(E: int, frozen: bool, pairs: int) -> dict[str, Any]:
    """Return sizes, bytes and seconds, each with and without recomputation.

    Parameters
    ----------
    E : int
        Width of text and features; D is 64.
    frozen : bool
        Whether the features come from a frozen encoder, and get no gradient.
    pairs : int
        Number of turns of both.
    """
    torch.manual_seed(0)
    H, S_Q, S_KV = E // 64, E, 16 * E
    x, features = torch.randn(1, S_Q, E, requires_grad=True), torch.randn(1, S_KV, E)
    features.requires_grad_(not frozen)
    models = {
        again: Layers(LAYERS, E, H, num_kv_heads=H // HEADS_TO_ONE, recompute_kv=again)
        for again in (True, False)
    }
    row: dict[str, Any] = {"E": E, "S_Q": S_Q, "S_KV": S_KV, "H": H, "frozen": frozen}
    for again, model in models.items():
        row[kind(again)] = {
            "bytes": saved_bytes(model, x, features), "peak": peak_bytes(model, x, features),
            "forward": [], "step": [],
        }  # fmt: skip
    steps = (partial(step, models[again], x, features) for again in (True, False))
    again, kept = row[kind(True)], row[kind(False)]
    for turns in take_turns(pairs + 1, *steps)[1:]:  # the first pair warms up
        for variant, (forward, both) in zip((again, kept), turns, strict=True):
            variant["forward"].append(forward)
            variant["step"].append(both)
    row["memory"] = sum(again["bytes"].values()) / sum(kept["bytes"].values())
    row["peak"] = again["peak"] / kept["peak"]
    row["time"] = median(a / b for a, b in zip(again["step"], kept["step"], strict=True))
    return row


def step(model: Layers, x: Tensor, features: Tensor) -> tuple[float, float]:
    """Return the seconds of a forward, and of it and its backward together."""
    leaves = [t for t in (x, features, *model.parameters()) if t.requires_grad]
    start = perf_counter()
    out = model(x, features)
    forward = perf_counter() - start
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return forward, perf_counter() - start


def kind(again: bool) -> str:
    """Return the name of a variant."""
    return "recomputed" if again else "kept"


def show(row: dict[str, Any]) -> None:
    """Print one comparison."""
    encoder = "frozen" if row["frozen"] else "trained"
    print("{LAYERS} layers, E {E}, S_Q {S_Q}, S_KV {S_KV}, H {H}, ".format(LAYERS=LAYERS, **row)
          + f"{encoder} features")  # fmt: skip
    for name in ("recomputed", "kept"):
        sizes = ", ".join(f"{what} {n / 2**20:.1f}" for what, n in row[name]["bytes"].items() if n)
        print(f"  {name:10}  saved {sum(row[name]['bytes'].values()) / 2**20:6.1f} MiB  "
              f"peak {row[name]['peak'] / 2**20:6.1f} MiB  "
              f"forward {median(row[name]['forward']):.3f} s  "
              f"step {median(row[name]['step']):.3f} s\n"
              f"{'':14}of what is saved: {sizes} MiB")  # fmt: skip
    ratios = "recomputed over kept: saved {memory:.1%}  peak {peak:.1%}  time {time:.3f}"
    print("  " + ratios.format(**row), flush=True)


if __name__ == "__main__":
    main()

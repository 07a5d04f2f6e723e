"""What it saves to make keys and values again in the backward, and what it costs.

    python benchmarks/recompute.py [--json FILE] [--threads N] [--quick]

Layers of cross-attention with 4 query heads to a key-value head, S_Q = E and S_KV = 16 S_Q, all
reading the same features, in one process and fp32.  Bytes between forward and backward are counted,
storage by storage.  A step is forward and backward: with recomputation and without it in turn, and
the median of the ratios of such pairs is what counts.
"""

import argparse
import json
import os
from statistics import median
from time import perf_counter
from typing import Any

import torch
from activations import Layers, peak_bytes, saved_bytes
from machine import describe
from torch import Tensor

from lvxattn.cli.arguments import writable

MEMORY_GOAL, TIME_GOAL = 0.40, 1.08
LAYERS, HEADS_TO_ONE = 8, 4


def main() -> None:
    """Print, and on request store, the bytes saved and the time that takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=writable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="E = 256 only, 2 pairs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, load = [], os.getloadavg()[0]
    widths = [(256, False)] if options.quick else [(256, False), (256, True), (512, False)]
    for E, frozen in widths:
        rows.append(compare(E, frozen, 2 if options.quick else options.pairs))
        show(rows[-1])
    of = " of the full version on a quiet machine" if options.quick else ""
    print(f"goals{of}: saved at most {MEMORY_GOAL:.0%}, time at most {TIME_GOAL}")
    if options.json:
        stored = {"machine": describe(), "torch": torch.__version__, "threads": options.threads}
        stored |= {"load": [load, os.getloadavg()[0]]}
        stored |= {"memory goal": MEMORY_GOAL, "time goal": TIME_GOAL, "layers": LAYERS}
        with open(options.json, "w") as file:
            json.dump({**stored, "rows": rows}, file, indent=1)


def compare(E: int, frozen: bool, pairs: int) -> dict[str, Any]:
    """Return sizes, bytes and seconds, each with and without recomputation.

    Parameters
    ----------
    E : int
        The width of text and features; D is 64.
    frozen : bool
        Whether the features come from an encoder that is not trained: they get no gradient.
    pairs : int
        How often both take their turn.
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
    for number in range(pairs + 1):
        # Which comes first alternates, so that what one leaves behind hits both alike.
        for again in (True, False) if number % 2 else (False, True):
            forward, both = step(models[again], x, features)
            if number:  # the first pair warms up
                row[kind(again)]["forward"].append(forward)
                row[kind(again)]["step"].append(both)
    again, kept = row[kind(True)], row[kind(False)]
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
    """Return how a variant is called where it is printed and stored."""
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

"""The kernels behind torch_impl's block attention against one another: what `auto` rests on.

    python benchmarks/kernels.py [--json FILE] [--threads N] [--quick]

Every kernel that can do a job does it in turn, forward and backward, and the least time of
`--repeat` is kept: what others do on the machine can only add to it.  The last lines compare one
rank's whole work with F.scaled_dot_product_attention, whose goal is at most 3 % more.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from machine import describe
from torch import Tensor

from lvxattn.cli.arguments import writable
from lvxattn.common.masks import MaskView
from lvxattn.torch_impl import block_attention, block_attention_backward, cross_attention
from lvxattn.torch_impl.kernels import KERNELS, KernelSpec
from lvxattn.torch_impl.kernels.choose import choose

GOAL = 1.03
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def main() -> None:
    """Print, and on request store, milliseconds by kernel for several shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=writable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few sizes in fp32, once")
    options = parser.parse_args()
    if options.quick:
        options.repeat = 1
    torch.set_num_threads(options.threads)
    rows, load = [], os.getloadavg()[0]
    print("milliseconds, forward + backward; * marks what auto takes")
    for job, mask in jobs(options.quick):
        rows.append(compare(job, mask, options.repeat))
        print(line(rows[-1]), flush=True)
    overhead = one_rank(options.repeat)
    of = " of the full version on a quiet machine" if options.quick else ""
    print("one rank's cross_attention over scaled_dot_product_attention: "
          f"forward {overhead['forward']:.3f}, with backward {overhead['both']:.3f}; "
          f"goal{of} {GOAL}")  # fmt: skip
    if options.json:
        stored = {"machine": describe(), "torch": torch.__version__, "threads": options.threads}
        stored |= {"load": [load, os.getloadavg()[0]], "goal": GOAL, "one rank": overhead}
        with open(options.json, "w") as file:
            json.dump({**stored, "rows": rows}, file, indent=1)


def jobs(quick: bool) -> list[tuple[KernelSpec, str]]:
    """Return the shapes that are measured, with the kind of mask."""
    lengths = [(1, 16384), (16, 16384), (128, 16384), (1024, 4096)]
    if quick:
        return [
            (KernelSpec("cpu", torch.float32, 1, 8, 2, s_q, s_kv, 64, 64), "none")
            for s_q, s_kv in lengths
        ]
    lengths += [(16, 65536), (128, 65536), (1024, 16384), (2048, 4096)]
    found = []
    for dtype in DTYPES:
        for s_q, s_kv in lengths:
            for D in (64, 128):
                found += [(KernelSpec("cpu", dtype, 1, 8, 2, s_q, s_kv, D, D), "none")]
        found += [(KernelSpec("cpu", dtype, 1, 4, 1, 16, 16384, 64, 64), "none")]
    for s_q in (16, 128, 1024):
        found += [(KernelSpec("cpu", torch.float32, 1, 8, 2, s_q, 4096, 64, 64), "padding")]
        found += [(KernelSpec("cpu", torch.float32, 1, 8, 2, s_q, 4096, 64, 64), "array")]
    return found


def compare(job: KernelSpec, kind: str, repeat: int) -> dict[str, Any]:
    """Return the job, and by kernel the milliseconds of its forward and of its backward."""
    torch.manual_seed(0)
    q, dout = (torch.randn(job.B, job.H, job.s_q, job.D).to(job.dtype) for _ in range(2))
    k, v = (torch.randn(job.B, job.H_KV, job.s_kv, job.D).to(job.dtype) for _ in range(2))
    mask: Tensor | None = None
    if kind == "padding":
        mask = (torch.arange(job.s_kv) < job.s_kv * 3 // 4)[None, None, None]
    if kind == "array":
        mask = torch.rand(1, 1, job.s_q, job.s_kv) < 0.7
    scale, measured, auto = job.D**-0.5, {}, []
    for backward in (False, True):
        auto.append(choose(KernelSpec.of(q, k, v, MaskView.of(mask), backward=backward)))
    out, lse = block_attention(q, k, v, scale=scale, mask=mask, kernel="blocked")
    delta = (dout * out).sum(dim=-1)
    given = (dout, q, k, v, lse, delta)
    for name, kernel in KERNELS.items():
        if kernel.unsupported(KernelSpec.of(q, k, v, MaskView.of(mask), backward=True)) is not None:
            continue
        options: dict[str, Any] = {"scale": scale, "mask": mask, "kernel": name}
        forward = least(lambda o=options: block_attention(q, k, v, **o), repeat)
        backward_ = least(lambda o=options: block_attention_backward(*given, **o), repeat)
        measured[name] = [round(1e3 * forward, 2), round(1e3 * backward_, 2)]
    sizes = {n: getattr(job, n) for n in ("H", "H_KV", "s_q", "s_kv", "D")}
    dtype = str(job.dtype).removeprefix("torch.")
    return {"dtype": dtype, **sizes, "mask": kind, "milliseconds": measured, "auto": auto}


def line(row: dict[str, Any]) -> str:
    """Return one comparison as text."""
    cells = []
    for name, times in row["milliseconds"].items():
        said = (
            f"{t:.2f}{'*' * (name == auto)}" for t, auto in zip(times, row["auto"], strict=True)
        )
        cells.append(f"{name} {' + '.join(said)}")
    sizes = "{dtype:8} H_KV {H_KV} s_q {s_q:4} s_kv {s_kv:5} D {D:3} mask {mask:7}"
    return f"{sizes.format(**row)} {'  '.join(f'{cell:<27}' for cell in cells).rstrip()}"


def one_rank(repeat: int) -> dict[str, float]:
    """Return cross_attention's time over F.scaled_dot_product_attention's: medians over pairs.

    Through autograd, as people call both.
    """
    q, dout = (torch.randn(1, 8, 1024, 64, requires_grad=True) for _ in range(2))
    k, v = (torch.randn(1, 8, 16384, 64, requires_grad=True) for _ in range(2))
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def both(attend: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), dout.detach())

    def forward(attend: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            attend(q, k, v)

    ratios: dict[str, float] = {}
    for name, work in (("forward", forward), ("both", both)):
        pairs = []
        for number in range(4 * repeat):
            # Which comes first alternates, so that what one leaves behind hits both alike.
            order = (cross_attention, sdpa) if number % 2 else (sdpa, cross_attention)
            times = {attend: least(partial(work, attend), 1, warm=not number) for attend in order}
            pairs.append(times[cross_attention] / times[sdpa])
        ratios[name] = round(median(pairs), 4)
    return ratios


def least(fn: Callable[[], object], repeat: int, *, warm: bool = True) -> float:
    """Return the least time of some calls in seconds, after one that is not counted."""
    if warm:
        fn()
    times = []
    for _ in range(repeat):
        start = perf_counter()
        fn()
        times.append(perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()

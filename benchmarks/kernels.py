"""The kernels of torch_impl's block attention, compared: the basis of `auto`.

    python benchmarks/kernels.py [--json FILE] [--threads N] [--quick]

Every kernel that supports a job does it in turn, forward and backward, and the minimum time of
several is kept, as other work on the machine only adds to it.  The last line compares all of one
rank's work with F.scaled_dot_product_attention; the goal is at most 3 % more.
"""

import os
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from bench import goal_of, parser_for, seconds, take_turns, write_json
from torch import Tensor

from lvxattn.common.masks import MaskView
from lvxattn.torch_impl import block_attention, block_attention_backward, cross_attention
from lvxattn.torch_impl.kernels import KERNELS, KernelSpec
from lvxattn.torch_impl.kernels.choose import choose

GOAL = 1.03
REPEAT = 5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def main() -> None:
    """Print, and on request store, milliseconds by kernel for several shapes."""
    parser = parser_for(__doc__, "a few sizes in fp32, once", "json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    repeat = 1 if options.quick else REPEAT
    torch.set_num_threads(options.threads)
    rows, load = [], os.getloadavg()[0]
    print("milliseconds, forward + backward; * marks the choice of auto")
    for job, mask in jobs(options.quick):
        rows.append(compare(job, mask, repeat))
        print(line(rows[-1]), flush=True)
    overhead = one_rank(repeat)
    print("one rank's cross_attention over scaled_dot_product_attention: "
          f"forward {overhead['forward']:.3f}, with backward {overhead['both']:.3f}; "
          f"goal{goal_of(options.quick)} {GOAL}")  # fmt: skip
    stored = {"torch": torch.__version__, "threads": options.threads}
    stored |= {"load": [load, os.getloadavg()[0]], "goal": GOAL, "one rank": overhead}
    write_json(options.json, {**stored, "rows": rows})


def jobs(quick: bool) -> list[tuple[KernelSpec, str]]:
    """Return the shapes to measure, with the kind of mask."""

    def job(
        s_q: int, s_kv: int, D: int = 64, dtype: torch.dtype = torch.float32, H_KV: int = 2
    ) -> KernelSpec:
        return KernelSpec("cpu", dtype, 1, 4 * H_KV, H_KV, s_q, s_kv, D, D)

    lengths = [(1, 16384), (16, 16384), (128, 16384), (1024, 4096)]
    if quick:
        return [(job(*sizes), "none") for sizes in lengths]
    lengths += [(16, 65536), (128, 65536), (1024, 16384), (2048, 4096)]
    found = []
    for dtype in DTYPES:
        for s_q, s_kv in lengths:
            found += [(job(s_q, s_kv, D, dtype), "none") for D in (64, 128)]
        found += [(job(16, 16384, dtype=dtype, H_KV=1), "none")]
    return found + [
        (job(s_q, 4096), mask) for s_q in (16, 128, 1024) for mask in ("padding", "array")
    ]


def compare(job: KernelSpec, kind: str, repeat: int) -> dict[str, Any]:
    """Return the job, and milliseconds of forward and backward by kernel."""
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

    Through autograd, as users call both.
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
        ours, theirs = partial(work, cross_attention), partial(work, sdpa)
        ours(), theirs()
        pairs = take_turns(4 * repeat, partial(seconds, ours), partial(seconds, theirs))
        ratios[name] = round(median(a / b for a, b in pairs), 4)
    return ratios


def least(work: Callable[[], object], repeat: int) -> float:
    """Return the minimum duration of some calls, after one that is not counted."""
    work()
    return min(seconds(work) for _ in range(repeat))


if __name__ == "__main__":
    main()

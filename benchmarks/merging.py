"""Ways to reduce partial results over gloo, which takes no user-defined operator, timed.

    python benchmarks/merging.py [--quick] [--store DIR]

    home              one all-to-all to the owners, which merge (torch_impl)
    reduce-scatter    lse is gathered, every rank weights its out by exp(lse - lse of all), and a
                      reduce-scatter sums it; rows are padded to one length per rank
    all-reduce        the same with an all-reduce: twice the bytes, in a collective that every
                      library has tuned

All take turns in every round, in alternating order; a turn takes as long as its slowest rank, and
the result is the median over rounds of the ratio of two turns.  Prints a table in Markdown;
`--store` writes it, and every turn as JSON, to DIR.  Exit status 2 where no cluster of shaped links
can be built; `--quick` needs none.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from bench import (
    Results,
    describe_run,
    exit_without_lab,
    mpirun,
    parser_for,
    printed_by,
    publish,
)
from netlab.lab import Lab, address, bits_per_second
from network_report import rate
from torch import Tensor

from lvxattn.torch_impl import Layout
from lvxattn.torch_impl.collectives import reduce_scatter
from lvxattn.torch_impl.exchange import Exchange
from lvxattn.torch_impl.group import Group
from lvxattn.torch_impl.merge import lse_of, merge_partials

Way = Callable[[Exchange, Tensor, Tensor], tuple[Tensor, Tensor]]

H, D = 8, 64
RATE, PORT = "1gbit", 29511


def merged_at_home(exchange: Exchange, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's rows of the merged results, as torch_impl does."""
    out, top, total = reduce_scatter(exchange, merge_partials, out, lse, torch.ones_like(lse))
    return out, lse_of(top, total)


def reduce_scattered(exchange: Exchange, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's rows of the merged results, by a reduce-scatter."""
    layout = exchange.layout
    weight, total = weights(exchange, lse)
    # Contiguous rows, equally many for every rank.
    rows = out.new_zeros((layout.size, *out.shape[:2], max(layout.s_q), out.shape[3]))
    lengths = list(layout.s_q)
    for room, w, part in zip(rows, weight.split(lengths, 2), out.split(lengths, 2), strict=True):
        torch.mul(w, part, out=room[:, :, : part.shape[2]])
    mine = torch.empty_like(rows[0])
    dist.reduce_scatter_single(mine.view(-1), rows.view(-1))
    return mine[:, :, : lengths[layout.rank]], total


def all_reduced(exchange: Exchange, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's rows of the merged results, by an all-reduce."""
    layout = exchange.layout
    weight, total = weights(exchange, lse)
    out = weight * out
    dist.all_reduce(out)
    return out.split(list(layout.s_q), 2)[layout.rank], total


def weights(exchange: Exchange, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of this rank's results for all queries, and lse of its own queries."""
    layout = exchange.layout
    lse_of_all = lse.new_empty((layout.size, *lse.shape))
    dist.all_gather_single(lse_of_all.view(-1), lse.view(-1))
    total = lse_of_all.logsumexp(dim=0)
    weight = torch.exp(lse - torch.where(total == -torch.inf, 0.0, total))[..., None]
    return weight, total.split(list(layout.s_q), 2)[layout.rank]


WAYS: dict[str, Way] = {
    "home": merged_at_home,
    "reduce-scatter": reduce_scattered,
    "all-reduce": all_reduced,
}


def on_a_rank(work: Results) -> list[Results]:
    """Time all ways on every size.  Collective; the result is the same on every rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{work['address']}",
        rank=int(os.environ["PMI_RANK"]), world_size=int(os.environ["PMI_SIZE"]),
    )  # fmt: skip
    results = [measure(S_Q, work["rounds"], work["seconds"]) for S_Q in work["S_Q"]]
    dist.destroy_process_group()
    return results


def measure(S_Q: int, rounds: int, seconds: float) -> Results:
    """Return the seconds of every turn at one size, by way.  Collective."""
    group = Group.of(None)
    torch.manual_seed(group.rank)
    s_q = len(range(S_Q)[group.rank :: group.size])
    q = torch.empty((1, H, s_q, D))
    layout = Layout.agree(q, q[:, :, :0], q[:, :, :0], group, schedule="gather")
    exchange = Exchange(group, layout, q)
    out, lse = torch.randn((1, H, S_Q, D)), torch.randn((1, H, S_Q))
    check(exchange, out, lse)
    turns: dict[str, list[float]] = {name: [] for name in WAYS}
    start = perf_counter()
    for number in range(rounds):
        if number >= 5 and agreed(perf_counter() - start) > seconds:
            break
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            dist.barrier()
            begin = perf_counter()
            WAYS[name](exchange, out, lse)
            turns[name].append(agreed(perf_counter() - begin))
    return {"P": group.size, "S_Q": S_Q, "turns": turns}


def check(exchange: Exchange, out: Tensor, lse: Tensor) -> None:
    """Assert that all ways agree, also where no rank has a key."""
    lse = lse.clone()
    lse[:, : H // 2, 0] = -torch.inf
    out = out * (lse > -torch.inf)[..., None]
    home, *others = (way(exchange, out, lse) for way in WAYS.values())
    # A merge has an error of (2 lse + 8) u times its inputs, and so has a weighted sum.
    largest = agreed(out.abs().max().item()), agreed(lse.abs().nan_to_num(posinf=0).max().item())
    P = exchange.layout.size
    limit = 2 * P * (2 * (largest[1] + P) + 8) * 2.0**-24 * max(largest)
    for other in others:
        torch.testing.assert_close(other, home, rtol=0, atol=limit)


def agreed(seconds: float) -> float:
    """Return the largest of all ranks'.  Collective."""
    largest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def in_shared_memory(P: int, work: Results) -> list[Results]:
    """Measure on ranks of this machine, over its loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return read(mpirun(P, program({**work, "address": f"127.0.0.1:{port}"})), None)


def on_hosts(P: int, work: Results) -> list[Results]:
    """Measure on a cluster of shaped links, one rank per host."""
    with Lab(P, RATE) as lab:
        command = program({**work, "address": f"{address(0)}:{PORT}"})
        return read(lab.mpiexec(command, env={"GLOO_SOCKET_IFNAME": "e0"}), bits_per_second(RATE))


def program(work: Results) -> list[str]:
    """Return the command of a rank; Hydra sets its number."""
    return [sys.executable, __file__, "--on-a-rank", json.dumps(work)]


def read(done: "subprocess.CompletedProcess[str]", rate: int | None) -> list[Results]:
    """Return the results that rank 0 printed, with the link's rate."""
    printed = next(line for line in printed_by(done).splitlines() if line.startswith("[{"))
    return [{"bits_per_second": rate, **result} for result in json.loads(printed)]


def markdown(measured: Results) -> str:
    """Return the report."""
    lines = [
        "# Merging at home, or weighting and summing",
        "",
        f"Measured {measured['date']} on {measured['machine']['processor']}, "
        f"{measured['machine']['cores']} cores, PyTorch {measured['torch']}, gloo; one thread a "
        f"rank, B = 1, H = {H}, D = {D}, fp32. The reduction alone, medians over rounds. Home: "
        "all-to-all, merged by the owner, as torch_impl does. Reduce-scatter, all-reduce: lse "
        "gathered, out weighted and summed. Made by `python benchmarks/merging.py --store "
        "benchmarks/results`; `merging.json` has every turn.",
        "",
        "| link | P | S_Q | home | reduce-scatter | over home | all-reduce | over home |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in measured["rows"]:
        home, *others = r["turns"].values()
        cells = [rate(r), str(r["P"]), f"{r['S_Q']:,}", f"{median(home) * 1e3:.2f} ms"]
        for other in others:
            over = median(b / a for a, b in zip(home, other, strict=True))
            cells += [f"{median(other) * 1e3:.2f} ms", f"{over:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, store; or be a rank."""
    parser = parser_for(__doc__, "2 ranks in shared memory only", "store")
    parser.add_argument("--on-a-rank", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.on_a_rank:
        results = on_a_rank(json.loads(options.on_a_rank))
        if os.environ["PMI_RANK"] == "0":
            print(json.dumps(results))
        return
    if options.quick:
        rows = in_shared_memory(2, {"S_Q": [1, 64, 1024], "rounds": 10, "seconds": 0.5})
    else:
        work = {"S_Q": [1, 64, 1024, 8192], "rounds": 60, "seconds": 5}
        with exit_without_lab("merging"):
            rows = [row for where in (in_shared_memory, on_hosts)
                    for P in (2, 4) for row in where(P, work)]  # fmt: skip
    measured = {**describe_run(options.quick), "torch": torch.__version__, "rows": rows}
    publish("merging", measured, markdown(measured), options)


if __name__ == "__main__":
    main()

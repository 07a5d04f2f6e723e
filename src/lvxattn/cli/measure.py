"""The command ``measure``: measure this machine and save its figures."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvxattn.cli.arguments import AddCommand, check_output, positive, refuse
from lvxattn.cli.run_ranks import Ranks, check_room, on_rank_0
from lvxattn.cli.tensors import InputError
from lvxattn.common.validation import FLOATING
from lvxattn.common.wire import ITEMSIZE
from lvxattn.plan.machine import Link
from lvxattn.plan.measure import FEWEST_KEYS, Probe, measure

_NAME = "lvxattn measure"


def add_measure(add: AddCommand, run: Callable[..., int], output: str) -> None:
    """Add ``measure`` to the commands of an implementation.

    Parameters
    ----------
    add : callable
    run : callable
        The command's function.
    output : str
        The default file, one for each implementation, as their figures differ.
    """
    parser = add(
        "measure", run,
        help="measure the speed of this machine",
        description="Measure what the choice of a schedule rests on, within 10 seconds.",
    )  # fmt: skip
    for name, default, what in (
        ("--heads", 8, "query heads, H (default: 8)"),
        ("--kv-heads", None, "key-value heads, H_KV (default: as many as heads)"),
        ("--head-dim", 64, "width of queries and keys, D (default: 64)"),
    ):
        parser.add_argument(name, type=positive, default=default, metavar="N", help=what)
    parser.add_argument("--dtype", choices=FLOATING, default="float32", help="(default: float32)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument(
        "--output", default=output, metavar="FILE",
        help="the machine file, for --machine (default: %(default)s)",
    )  # fmt: skip


def run_measure(
    options: argparse.Namespace,
    ranks: Ranks,
    probe: Callable[[Any, tuple[int, int, int], str], Probe],
) -> int:
    """Measure this machine, print its figures and save them.  Collective: every rank calls this.

    Parameters
    ----------
    options : argparse.Namespace
        As defined by `add_measure`.
    ranks : Ranks
    probe : callable
        Returns a backend's probe for H, H_KV, D and a dtype.

    Returns
    -------
    int
        0, or 2 if the input is bad; the same on all ranks.
    """
    path = Path(options.output)
    H, H_KV, D = options.heads, options.kv_heads or options.heads, options.head_dim
    if H % H_KV:
        wrong = f"--kv-heads: expected a divisor of --heads {H}, got {H_KV}"
        return refuse(f"{_NAME}: error: {wrong} (on all ranks)", ranks.rank)
    try:
        on_rank_0(lambda: check_output("--output", options.output), ranks)
        ranks.limit_threads()
        backend = ranks.backend(options.device, options.dtype)
        # The first keys and values that are timed.
        need = ITEMSIZE[options.dtype] * D * (H + 2 * H_KV * FEWEST_KEYS)
        memory = check_room(need, ranks, "give fewer --heads or a smaller --head-dim")
        if ranks.rank == 0:
            print(f"memory: at least {memory}", flush=True)
        machine = measure(ranks, probe(backend, (H, H_KV, D), options.dtype), path.stem)
        on_rank_0(lambda: machine.save(path), ranks)
    except InputError as error:
        return refuse(f"{_NAME}: error: {error}", ranks.rank)
    if ranks.rank == 0:
        hosts = -(-machine.ranks // machine.ranks_per_host)
        alone = machine.ranks_per_host == 1
        inside = "not measured: one rank a host" if alone else _link(machine.inside)
        between = "not measured: one host" if hosts == 1 else _link(machine.between)

        new = machine.copy_new or machine.copy
        once = machine.message_at_once * 1e6

        def back(name: str) -> str:
            return f"; backward {getattr(machine, f'{name}_backward') / 1e9:.1f}"

        print(f"""
LV-XAttn measure
  ranks     {machine.ranks} on {hosts} host{"s" * (hosts > 1)}, {backend.device}
  problems  {H}/{H_KV} heads of {D}, {options.dtype}

  attention         {machine.matmul / 1e9:>10.1f} GFLOP/s a rank, many queries{back("matmul")}
  reading of keys   {machine.memory / 1e9:>10.2f} GB/s a rank, one query{back("memory")}
  copying           {machine.copy / 1e9:>10.2f} GB/s a rank; into new memory {new / 1e9:.2f}
  a block takes     {machine.start * 1e6:>10.1f} us at least
  a pass takes      {machine.call * 1e6:>10.1f} us more
  a message takes   {machine.message * 1e6:>10.1f} us of a rank; of many {once:.1f}
  inside a host     {inside}
  between hosts     {between}

  written   {path}""")
    return 0


def _link(link: Link) -> str:
    return (
        f"{link.bandwidth / 1e9:>10.3f} GB/s, {link.latency * 1e6:.1f} us latency; "
        f"a receiver is busy for {link.busy:.0%} of a message's time"
    )

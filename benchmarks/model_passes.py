"""Time training steps of whole models on the ranks of this run, kinds in turn; rank 0 prints JSON.

    mpiexec -n P python benchmarks/model_passes.py STORE '[{"model": "llama3v", ...}, ...]'

Every item holds the arguments of a `Work`.  STORE is a file, not there yet, through which the ranks
meet; blocks travel over gloo.  The kinds take turns, round by round, as in `passes.py`.

    "lv-xattn", "ring", "ulysses"   text sharded, and cross-attention by a schedule
    "replicated"                    every rank has the text
    "kept"                          "lv-xattn" that keeps keys and values for the backward
    "none", "none replicated"       "lv-xattn" and "replicated" with messages switched off

A step is a forward and a backward of the model on this rank's share of a batch, which has been cut.
Visual features are given: what a vision tower makes of frames takes as long for every kind.
"""

import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from netlab.lab import sent_by

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries, as they are imported
    from model_zoo import MODELS

    from lvxattn.common.meter import Meter
    from lvxattn.torch_impl.group import Group
    from lvxattn.torch_impl.models import Spread, distribute


@dataclass(frozen=True)
class Work:
    """A model and a batch to be timed, and the number of turns.

    Attributes
    ----------
    model : str
        A name in `MODELS`.
    kinds : list of str
    text_tokens, features : int
        S_Q and S_KV.
    rounds : int
        Maximum number of rounds.
    seconds : float
        Time after which no second round begins.
    options : dict
        Further arguments of the model's function.
    """

    model: str
    kinds: list[str]
    text_tokens: int
    features: int
    rounds: int = 5
    seconds: float = 60.0
    options: dict[str, Any] | None = None


class Model:
    """One model, spread over the ranks as a kind says."""

    def __init__(self, work: Work, kind: str, group: Group) -> None:
        torch.manual_seed(0)
        self.kind, self.group = kind, group
        self.model, batch = MODELS[work.model](
            work.text_tokens, work.features, **(work.options or {})
        )
        schedule = kind if kind in ("ring", "ulysses") else "lv-xattn"
        text = "replicated" if "replicated" in kind else "sharded"
        self.spread: Spread = distribute(
            self.model, group, text=text, schedule=schedule, recompute_kv=kind != "kept"
        )
        self.local = self.spread.inputs(**batch)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def turn(self) -> dict[str, Any]:
        """Time one step.  Collective; the record is the same on every rank.

        Returns
        -------
        dict
            seconds : from the first rank's start to the last one's end
            waiting : seconds of every rank
            bytes, link : that every rank counted as sent, and its link's counter, in a lab
        """
        self.spread.meter = meter = Meter()
        dist.barrier()
        link, start = link_bytes(), perf_counter()
        with muted() if "none" in self.kind else nullcontext():
            self.model(**self.local).loss.backward()
        mine = start, perf_counter()
        times = self.group.allgather((*mine, meter.waiting, meter.bytes, link_bytes() - link))
        self.model.zero_grad()
        starts, ends, waiting, sent, link_sent = map(list, zip(*times, strict=True))
        return {
            "seconds": max(ends) - min(starts), "waiting": waiting, "bytes": sent,
            "link": link_sent,
        }  # fmt: skip

    def average(self) -> float:
        """Time the average of gradients over the ranks, once.  Collective."""
        self.model(**self.local).loss.backward()
        dist.barrier()
        start = perf_counter()
        self.spread.average_gradients()
        return max(self.group.allgather(perf_counter() - start))


@contextmanager
def muted() -> Iterator[None]:
    """Switch messages off: a rank receives what it sends, copied once within the rank.

    All else is done as otherwise, with numbers of the usual size.  Results are wrong, and ranks
    must hold shares of one size.
    """
    batch, exchange = dist.batch_isend_irecv, dist.all_to_all_single

    def copy_batch(ops: list[Any]) -> list[Any]:
        receive, send = ops
        receive.tensor.copy_(send.tensor)
        return [Done(), Done()]

    def copy_all(room: torch.Tensor, sent: torch.Tensor, *_: Any, **__: Any) -> None:
        room.copy_(sent)

    dist.batch_isend_irecv, dist.all_to_all_single = copy_batch, copy_all
    try:
        yield
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = batch, exchange


class Done:
    """A message that has arrived."""

    def wait(self) -> None:
        """Return."""


def link_bytes() -> int:
    """Return the bytes that left over this host's link; 0 outside a lab."""
    return sent_by("self") if os.environ.get("NETLAB_HOSTS") else 0


def timed(work: Work, group: Group) -> dict[str, Any]:
    """Return the work, and one record per turn for every kind.  Collective."""
    models = {kind: Model(work, kind, group) for kind in work.kinds}
    turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in work.kinds}
    for model in models.values():
        if model.kind != "ring":
            model.turn()
    start = perf_counter()
    for turn in range(work.rounds):
        if turn and group.allgather(perf_counter() - start > work.seconds)[0]:
            break
        for kind, model in models.items():
            if kind != "ring" or turn == 0:  # which takes long, and waits for the network
                turns[kind].append({"round": turn, **model.turn()})
    summed = models["lv-xattn"].average() if "lv-xattn" in models else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = next(iter(models.values())).parameters
    return {
        **asdict(work), "P": group.size, "turns": turns, "parameters": parameters,
        "summed": summed, "peak": group.allgather(peak),
    }  # fmt: skip


def main() -> None:
    """Time every item of the command line."""
    torch.set_num_threads(1)
    rank, size = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=size,
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    group = Group.of(None)
    results = [timed(Work(**item), group) for item in json.loads(sys.argv[2])]
    if rank == 0:
        json.dump({"torch": torch.__version__, "results": results}, sys.stdout)
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Run command lines one after the other, on all ranks; rank 0 prints what each rank said.

usage: commands.py mpi_impl|torch_impl JSON

JSON is a list of pairs: what shall come out wrong, or "", and a list of arguments, in which {rank}
is the rank's number.
"""

import json
import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any

implementation, lines = sys.argv[1:]
if implementation == "mpi_impl":
    from mpi4py import MPI

    number = MPI.COMM_WORLD.rank
else:
    number = int(os.environ["RANK"])
# Ranks' clocks differ, as those of hosts do, and go faster or slower.
clock = time.perf_counter
time.perf_counter = lambda: 1000 * number + (1 + 1e-4 * number) * clock()
main = import_module(f"lvxattn.{implementation}.__main__").main
lv_xattn = import_module(f"lvxattn.{implementation}.lv_xattn")
Backend = import_module(f"lvxattn.{implementation}.commands.run").Backend
DoctorRanks = import_module(f"lvxattn.{implementation}.commands.doctor").DoctorRanks
exchange = DoctorRanks.exchange
forward, backward = Backend.forward, Backend.backward

if implementation == "mpi_impl":
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
else:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
last = rank == size - 1


def spoiling(function: Any, name: str, factor: float = 1.001) -> Any:
    """Return a method, one of whose results is wrong by a thousandth on the last rank."""
    return lambda *args: {
        n: x * factor if n == name and last else x for n, x in function(*args).items()
    }


def damaged(self: Any, sent: Any, received: Any) -> float:
    """Exchange bytes as the doctor does, of which the last rank receives a wrong one."""
    seconds: float = exchange(self, sent, received)
    if received is not None:
        received[-1] += last
    return seconds


BREAKAGES: dict[str, tuple[Any, str, Any]] = {
    "": (lv_xattn, "merge_partials", lv_xattn.merge_partials),
    # Forgets what others said.
    "merge": (lv_xattn, "merge_partials", lambda out, top, total, *_: (out, top, total)),
    "nan": (Backend, "forward", spoiling(forward, "out", float("nan"))),
    "message": (DoctorRanks, "exchange", damaged),
    **{name: (Backend, "forward", spoiling(forward, name)) for name in ("out", "lse")},
    **{name: (Backend, "backward", spoiling(backward, name)) for name in ("dq", "dk", "dv")},
}

said = []
for breakage, argv in json.loads(lines):
    module, name, broken = BREAKAGES[breakage]
    original = getattr(module, name)
    setattr(module, name, broken)
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([word.replace("{rank}", str(rank)) for word in argv])
    setattr(module, name, original)
    said.append({"status": status, "out": out.getvalue(), "err": err.getvalue()})
gathered: list[Any] | None
if implementation == "mpi_impl":
    gathered = MPI.COMM_WORLD.gather(said)
else:
    gathered = [None] * size if rank == 0 else None
    dist.gather_object(said, gathered)
    dist.destroy_process_group()
if gathered is not None:
    json.dump([list(by_rank) for by_rank in zip(*gathered, strict=True)], sys.stdout)

"""Record when MPI is called to progress; rank 0 prints the records of all ranks as JSON.

Nothing is judged by the clock: what is asserted is which calls were made, in which order, and that
a large block arrives by calls of `progress` alone.
"""

import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.common.wire import BLOCKS, QUERIES
from lvxattn.mpi_impl import exchange, lv_xattn
from lvxattn.mpi_impl.tiles import Tiles
from tests.cases import Case

comm = MPI.COMM_WORLD
LIMIT = 30.0  # seconds, of which a right program needs a hundredth


class Recording(MPI.Request):
    """Records how many requests were pending at each call of Testall."""

    under_way: list[int] = []  # noqa: RUF012

    @classmethod
    def Testall(cls, requests: Any, statuses: Any = None) -> bool:
        cls.under_way.append(sum(r != MPI.REQUEST_NULL for r in requests))
        return bool(super().Testall(requests, statuses))


def a_block_by_progress_alone() -> dict[str, bool]:
    """Send 16 MB round by one hop; receive it without ever waiting."""
    rows = 2**19
    q = np.full((1, 1, rows, 8), comm.rank, np.float32)
    layout = mpi_impl.Layout.agree(q, q[:, :, :1], q[:, :, :1], comm)
    hop = exchange.Exchange(comm, layout, q)
    blocks = hop.rotation(QUERIES)
    blocks.send(q, hop=0)
    end = time.monotonic() + LIMIT
    coming = blocks.pending[blocks.receiving[1]]
    while coming.request != MPI.REQUEST_NULL and time.monotonic() < end:
        hop.progress()
    arrived = coming.request == MPI.REQUEST_NULL
    (block,) = blocks.receive(1)
    hop.finish()
    return {
        "arrived by progress": arrived,
        "right bytes": bool((block == (comm.rank - 1) % comm.size).all()),
    }


def passes() -> dict[str, Any]:
    """Run a forward and a backward of many tiles, with every call recorded."""
    exchange.MPI = SimpleNamespace(Request=Recording, BYTE=MPI.BYTE)  # type: ignore[attr-defined]
    events: list[str] = []
    tiles = [0]

    def recorded(event: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if event != "shift" or args[0].kind.tag == BLOCKS:
                events.append(event)
            return function(*args, **kwargs)

        return call

    def counted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            for keys in function(*args):
                tiles[0] += 1
                yield keys

        return call

    exchange.Rotation.start = recorded("shift", exchange.Rotation.start)  # type: ignore[method-assign]
    for name in ("partial_attention", "block_attention_backward"):
        setattr(lv_xattn, name, recorded("attend", getattr(lv_xattn, name)))
    Tiles.key_tiles = counted(Tiles.key_tiles)  # type: ignore[method-assign]

    case = Case("many tiles", H=1, H_KV=1, S_Q=1024, S_KV=10_240 * comm.size, dtype="float32")
    problem = case.make()
    part = problem.part(comm.rank, comm.size)
    arguments = part["q"], part["k"], part["v"]
    layout = mpi_impl.Layout.agree(*arguments, comm)
    out, lse = mpi_impl.cross_attention(*arguments, comm, layout=layout)
    forward = seen(events, tiles)
    mpi_impl.cross_attention_backward(part["dout"], *arguments, out, lse, comm, layout=layout)
    return {"forward": forward, "backward": seen(events, tiles)}


def seen(events: list[str], tiles: list[int]) -> dict[str, Any]:
    """Return the records of one pass, and clear them."""
    record = {
        "blocks": events.copy(),
        "tiles": tiles[0],
        "tests": len(Recording.under_way),
        "tests with a request under way": sum(n > 0 for n in Recording.under_way),
        "first test has the block's requests": Recording.under_way[:1] == [2],
    }
    events.clear()
    Recording.under_way.clear()
    tiles[0] = 0
    return record


ranks = comm.gather(a_block_by_progress_alone() | passes())
if comm.rank == 0:
    json.dump(ranks, sys.stdout)

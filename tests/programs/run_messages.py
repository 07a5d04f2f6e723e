"""Count what real ranks send in random problems; rank 0 prints, as JSON, where the plan is wrong.

Arguments: how many problems two schedules share by turns, and the dtypes.  The meter of every rank
is held against `lvxattn.plan.messages`, each pass by itself.  Ranks believe that they are
on two hosts, in turns, so that the ring is not in rank order.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from lvxattn.plan import messages
from lvxattn.reference import Meter
from tests.cases import MASKS, WAYS, Case, options_of, random_case
from tests.programs.start import OnArrays, finish, start

comm, implementation = start()
P = comm.size


class OnTwoHosts:
    """The communicator, but for the name of the host."""

    def __init__(self) -> None:
        self.host, self.rank, self.size = f"host {comm.rank % 2}", comm.rank, P

    def __getattr__(self, name: str) -> Any:
        return getattr(comm, name)


def ranks() -> Any:
    """Return the ranks, on two hosts."""
    if isinstance(implementation, OnArrays):  # whose ranks have to be a Group
        comm.host = f"host {comm.rank % 2}"
        return comm
    return OnTwoHosts()


def case_of(seed: int, kind: str) -> Case:
    """Return a random case; the masks take turns, and in every round of them the dtypes."""
    turn, number = divmod(seed, len(MASKS))
    case = random_case(seed).on(kind, P)
    given = {"mask": sorted(MASKS)[number], "dtype": dtypes[(turn + number) % len(dtypes)]}
    return replace(case, S_Q=case.S_Q % 40, S_KV=case.S_KV % 60, **given)


def mask_of(mask: Any, rank: int, seed: int) -> Any:
    """Return a rank's mask; in every other round of masks ranks differ in kind."""
    if seed // len(MASKS) % 2 == 0 or not isinstance(mask, np.ndarray):
        return mask
    if rank == seed % P:
        return None
    return np.where(mask, 0.0, -np.inf) if mask.dtype == bool and rank % 2 else mask


def difference(case: Case, kind: str, seed: int) -> list[Any] | None:
    """Run both passes; return what this rank has sent and should have, if that differs."""
    part, gradients = case.make().part(comm.rank, P, kind), ("qkv", "q", "kv")[seed % 3]
    given, mask = (part["q"], part["k"], part["v"]), mask_of(part["mask"], comm.rank, seed)
    options: dict[str, Any] = {"mask": mask, **options_of(kind, P)}
    layout = implementation.Layout.agree(*given, ranks(), gradients=gradients, **options)
    options["layout"] = layout
    forward, backward = Meter(), Meter()
    out, lse = implementation.cross_attention(*given, comm, **options, meter=forward)
    implementation.cross_attention_backward(
        part["dout"], *given, out, lse, comm, gradients=gradients, meter=backward, **options
    )
    sent = [[meter.messages, meter.bytes] for meter in (forward, backward)]
    if isinstance(implementation, OnArrays):  # its backward begins with another forward
        sent[1] = [b - f for f, b in zip(*sent, strict=True)]
    planned = [messages(layout, comm.rank, backward=b) for b in (False, True)]
    wanted = [[len(found), sum(message.nbytes for message in found)] for found in planned]
    return None if sent == wanted else [case.name, kind, case.dtype, comm.rank, sent, wanted]


count, *dtypes = sys.argv[1:]
wrong, seen = [], set()
for nth, kind in enumerate(WAYS):
    for seed in range(int(count)):
        if (nth + seed + seed // len(MASKS)) % 2:
            continue
        case = case_of(seed, kind)
        wrong += [found for found in comm.allgather(difference(case, kind, seed)) if found]
        grouped = "grouped" if case.H > case.H_KV else "not grouped"
        seen |= {case.dtype, case.mask, case.cut, grouped}
if comm.rank == 0:
    json.dump({"wrong": wrong, "seen": sorted(seen)}, sys.stdout)
finish(comm)

"""The planned messages are those sent, message by message, and on every rank's meter."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lvxattn import reference
from lvxattn.plan.steps import messages
from tests.cases import MASKS, WAYS, Case, options_of, random_case
from tests.launch import report
from tests.torch_ranks import torch_report

GRADIENTS = ("qkv", "q", "kv")


def case_of(seed: int, kind: str, P: int) -> Case:
    case = random_case(seed).on(kind, P)
    return replace(case, dtype="float64", S_Q=case.S_Q % 40, S_KV=case.S_KV % 60, B=1)


def passes(
    case: Case, kind: str, P: int, gradients: str
) -> tuple[Any, list[reference.Message], list[Any]]:
    """Run both passes; return a layout, and each pass's messages and meters by rank."""
    problem, logs = case.make(), [[], []]

    def forward(comm: reference.VirtualComm) -> Any:
        part, meter = problem.part(comm.rank, P, kind), reference.Meter()
        given = part["q"], part["k"], part["v"], comm
        options = {"mask": part["mask"], **options_of(kind, P)}
        layout = reference.Layout.agree(*given, gradients=gradients, **options)
        out, lse = reference.cross_attention(*given, layout=layout, meter=meter, **options)
        return layout, meter, out, lse

    hosts = [f"host {rank % 2}" for rank in range(P)]  # the ring is not in rank order
    found = reference.run_ranks(P, forward, log=logs[0], hosts=hosts)

    def backward(comm: reference.VirtualComm) -> reference.Meter:
        part, meter = problem.part(comm.rank, P, kind), reference.Meter()
        layout, _, out, lse = found[comm.rank]
        reference.cross_attention_backward(
            part["dout"], part["q"], part["k"], part["v"], out, lse, comm,
            layout=layout, meter=meter, mask=part["mask"], **options_of(kind, P),
        )  # fmt: skip
        return meter

    meters = reference.run_ranks(P, backward, log=logs[1], hosts=hosts)
    return found[0][0], logs, [[meter for _, meter, *_ in found], meters]


@pytest.mark.parametrize("seed", range(len(MASKS)))
@pytest.mark.parametrize("kind", WAYS)
def test_plan_foresees_every_message(kind: str, seed: int) -> None:
    P = 1 + seed % 5
    layout, logs, meters = passes(case_of(seed, kind, P), kind, P, GRADIENTS[seed // 5 % 3])
    for backward in (False, True):
        for rank in range(P):
            planned = messages(layout, rank, backward=backward)
            sent = Counter((m.dest, m.nbytes) for m in logs[backward] if m.source == rank)
            assert Counter((message.dest, message.nbytes) for message in planned) == sent
            meter = meters[backward][rank]
            assert meter.messages == len(planned)
            assert meter.bytes == sum(message.nbytes for message in planned)


def test_half_precision_results_travel_in_fp32() -> None:
    q, k = (np.zeros((1, 4, s, 8), np.float16) for s in (6, 10))
    layouts = reference.run_ranks(
        2, lambda comm: reference.Layout.agree(q, k, k, comm, schedule="gather")
    )
    sizes = sorted(message.nbytes for message in messages(layouts[0], 0))
    assert sizes == [4 * 6 * 8 * 2, 4 * 6 * (8 + 2) * 4]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("started", "P", "dtypes"),
    [(report, 3, ["float32", "float16"]), (torch_report, 3, ["float32", "float16", "bfloat16"])],
    ids=["mpi", "torch"],
)
def test_real_ranks_send_planned_messages(started: Any, P: int, dtypes: list[str]) -> None:
    found = started(P, "run_messages.py", str(2 * len(MASKS)), *dtypes)
    assert found["wrong"] == []
    cuts = {"even", "ragged", "first", "last"}
    assert set(found["seen"]) == {*dtypes, *MASKS, *cuts, "grouped", "not grouped"}

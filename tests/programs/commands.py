"""Run command lines one after the other, on all ranks; rank 0 prints what each rank said.

usage: commands.py JSON

JSON is a list of pairs: what shall come out wrong, or "", and a list of arguments.
"""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from mpi4py import MPI

import lvxattn.mpi_impl.lv_xattn as lv_xattn
from lvxattn.mpi_impl.__main__ import main
from lvxattn.mpi_impl.doctor import examination
from lvxattn.mpi_impl.doctor.ring import Link
from lvxattn.mpi_impl.run import backend

comm = MPI.COMM_WORLD
last = comm.rank == comm.size - 1
PATCHED = (
    (lv_xattn, "merge"),
    (backend, "cross_attention"),
    (backend, "cross_attention_backward"),
    (examination, "send_round"),
)
ORIGINALS = [getattr(*place) for place in PATCHED]
_, forward, backward, _ = ORIGINALS


def spoil(x: Any) -> Any:
    """Make the last rank's result wrong by a thousandth."""
    return (x * np.asarray(1.001, x.dtype)).astype(x.dtype) if last else x


def spoiling(function: Any, which: int, how: Any = spoil) -> Any:
    """Return a function, one of whose results is wrong."""
    return lambda *args, **kwargs: tuple(
        how(x) if n == which else x for n, x in enumerate(function(*args, **kwargs))
    )


BREAKAGES = {
    "": (lv_xattn, "merge", lv_xattn.merge),
    "merge": (lv_xattn, "merge", lambda out, lse, *_: (out, lse)),  # forgets what others said
    "out": (backend, "cross_attention", spoiling(forward, 0)),
    "lse": (backend, "cross_attention", spoiling(forward, 1)),
    "nan": (backend, "cross_attention", spoiling(forward, 0, lambda x: x * np.float32(np.nan))),
    "dq": (backend, "cross_attention_backward", spoiling(backward, 0)),
    "dk": (backend, "cross_attention_backward", spoiling(backward, 1)),
    "dv": (backend, "cross_attention_backward", spoiling(backward, 2)),
    "message": (
        examination,
        "send_round",
        lambda comm: Link((comm.rank - 1) % comm.size, comm.rank, not last, 1e-6, 1e9),
    ),
}

said = []
for breakage, argv in json.loads(sys.argv[1]):
    for place, original in zip(PATCHED, ORIGINALS, strict=True):
        setattr(*place, original)
    setattr(*BREAKAGES[breakage])
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(argv)
    said.append({"status": status, "out": out.getvalue(), "err": err.getvalue()})
gathered = comm.gather(said)
if gathered is not None:
    json.dump([list(by_rank) for by_rank in zip(*gathered, strict=True)], sys.stdout)

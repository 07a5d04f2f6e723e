"""Make one rank fail: arguments are the rank, how, where, and in which pass.

With "by itself" after them the program does not ask for a death notice; with "fork" each rank has
forked twice since: one child has ended, the other outlives it by a second.
"""

import atexit
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from lvxattn import mpi_impl
from lvxattn.mpi_impl import exchange, lv_xattn

comm = MPI.COMM_WORLD
rank, how, place, which = int(sys.argv[1]), *sys.argv[2:5]
failing = comm.rank == rank
P = comm.size
if "by itself" not in sys.argv:
    mpi_impl.announce_death(comm)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if "fork" in sys.argv:
    if not (child := os.fork()):
        atexit._run_exitfuncs()  # not all of an exit: MPI is the parent's to finalize
        os._exit(0)
    os.waitpid(child, 0)
    if not os.fork():
        time.sleep(1)
        os._exit(0)


def fail() -> None:
    if how == "raise":
        raise RuntimeError("broken on purpose")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "leave":
        sys.exit(0)
    if how == "leave a process":
        subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=-3, stderr=-3)


def fails_at(call_number: int, function: Any) -> Any:
    """Return `function` so that its call of this number fails half-way, on the failing rank."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if failing and calls == call_number:
            fail()
        return result

    return call


def mask_that_fails(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
    if how == "mask raises":
        return 1 // 0
    return kv_index * 0.0 + q_index


q, k = np.ones((1, 1, 5, 4)), np.ones((1, 1, 4, 4))
v = np.ones((1, 1, 4, 2))
options: dict[str, Any] = {"layout": mpi_impl.Layout.agree(q, k, v, comm)}
out, lse = mpi_impl.cross_attention(q, k, v, comm, **options)

if place == "in the first attend" or place == "in the second attend":
    name = "partial_attention" if which == "forward" else "block_attention_backward"
    number = 1 if place == "in the first attend" else 2
    setattr(lv_xattn, name, fails_at(number, getattr(lv_xattn, name)))
elif place == "in a wait":
    exchange.Rotation.receive = fails_at(1, exchange.Rotation.receive)  # type: ignore[method-assign]
elif place == "in the last shift":
    shifts = 2 * (P - 1)
    exchange.Rotation.start = fails_at(shifts, exchange.Rotation.start)  # type: ignore[method-assign]
elif place.startswith("hop "):  # of lv-xattn
    moment, hop = place.split()[2], int(place.split()[1])
    if moment == "begins":  # its block has come; from hop 2 on a result follows each
        number = 1 if hop == 1 else 2 * hop - 2
        exchange.Rotation.receive = fails_at(number, exchange.Rotation.receive)  # type: ignore[method-assign]
    elif moment == "computes":  # after my own block
        name = "partial_attention" if which == "forward" else "block_attention_backward"
        setattr(lv_xattn, name, fails_at(1 + hop, getattr(lv_xattn, name)))
    else:  # its result is on its way; before it went my own block, and all but the last visitor
        number = min(2 * hop + 1, 2 * (P - 1))
        exchange.Rotation.start = fails_at(number, exchange.Rotation.start)  # type: ignore[method-assign]
elif failing:
    fail()
if failing and how.startswith("mask"):
    options["mask"] = mask_that_fails
if failing and how == "misfit":
    k, v = k[:, :, :3], v[:, :, :3]
if failing and how == "other scale":
    options["scale"] = 0.25
if which == "forward":
    mpi_impl.cross_attention(q, k, v, comm, **options)
else:
    mpi_impl.cross_attention_backward(out, q, k, v, out, lse, comm, **options)
comm.barrier()
sys.stdout.write("reached the end\n")

"""Functions to be checked that turn against their process on one case, and are right on others.

The case is `HOSTILE`, the gaussian one: no other in these tests has 128 keys.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from lvxattn.check import judge as judging
from tests.oracle import plain, right

HOSTILE = 128  # keys
kept: list[Any] = []


def exits(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        os._exit(0)
    return right(q, k, v, scale=scale, mask=mask)


def ends(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        ctypes.CDLL(None)._exit(0)
    return right(q, k, v, scale=scale, mask=mask)


def crashes(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        ctypes.string_at(0)
    return right(q, k, v, scale=scale, mask=mask)


def is_killed(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(q, k, v, scale=scale, mask=mask)


def stops_its_parent(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        os.kill(os.getppid(), signal.SIGSTOP)
    return right(q, k, v, scale=scale, mask=mask)


def leaves_a_daemon(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    return right(q, k, v, scale=scale, mask=mask)


def keeps_the_lock(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        ctypes.PyDLL(None).pause()  # unlike CDLL, it does not release Python's lock
    return right(q, k, v, scale=scale, mask=mask)


def ignores_interrupts(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    while k.shape[2] == HOSTILE:
        try:
            time.sleep(1)
        except BaseException:
            continue
    return right(q, k, v, scale=scale, mask=mask)


def closes_all_files(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        os.closerange(0, 256)
    return right(q, k, v, scale=scale, mask=mask)


def writes_everywhere(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    for fd in range(3, 64) if k.shape[2] == HOSTILE else ():
        try:
            os.write(fd, b"words where no words are expected")
        except OSError:
            continue
    return right(q, k, v, scale=scale, mask=mask)


def changes_exp(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        exp = np.exp
        np.exp = lambda x, *more, **options: exp(x / 2, *more, **options)  # type: ignore[misc]
    return right(q, k, v, scale=scale, mask=mask)


def changes_the_limits(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        judging.UNIT.update(dict.fromkeys(judging.UNIT, 1e9))
        scale *= 2
    return right(q, k, v, scale=scale, mask=mask)


def changes_the_folder(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        os.chdir("/")
    return right(q, k, v, scale=scale, mask=mask)


def changes_an_old_result(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if k.shape[2] == HOSTILE:
        kept[-1][...] = 0
    out, lse = right(q, k, v, scale=scale, mask=mask)
    kept.append(out)
    return out, lse


def says_so(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    sys.stdout.write("said by the function\n")
    return right(q, k, v, scale=scale, mask=mask)


def has_constants(q: Any) -> Any:
    return (lambda: q in {"a", "b", "c", 1.5, (None, b"d")}), ("e", ("f",)), -0.0, ...


def leaves_a_thread(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return right(q, k, v, scale=scale, mask=mask)


def starts_a_process(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if os.fork() == 0:
        time.sleep(1000)
        os._exit(0)
    return right(q, k, v, scale=scale, mask=mask)


def in_torch(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    import torch

    if k.shape[2] == HOSTILE:
        ctypes.CDLL(None)._exit(3)
    return plain(torch, q, k, v, scale, mask, torch.float64)


def in_jax(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    import jax.numpy as jnp

    return plain(jnp, q, k, v, scale, mask, jnp.float64)


def on_ranks(q: Any, k: Any, v: Any, comm: Any, *, scale: float, mask: Any) -> Any:
    from lvxattn.reference import cross_attention

    if comm.size == 2 and comm.rank:
        ctypes.CDLL(None)._exit(4)
    out, lse = cross_attention(q, k, v, comm, scale=scale, mask=mask)
    return out.astype(q.dtype), lse


def exits_on_a_rank(q: Any, k: Any, v: Any, comm: Any, *, scale: float, mask: Any) -> Any:
    from lvxattn.mpi_impl import cross_attention

    if comm.rank == 1:
        os._exit(0)
    return cross_attention(q, k, v, comm, scale=scale, mask=mask)


def aborts_in_the_end(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if not kept:
        kept.append(atexit.register(os.abort))
    return right(q, k, v, scale=scale, mask=mask)


def hangs_in_its_first_call(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    if not kept:
        kept.append(None)
        time.sleep(600)
    return right(q, k, v, scale=scale, mask=mask)


def waits_for_a_lock(q: Any, k: Any, v: Any, *, scale: float, mask: Any) -> Any:
    from torch.utils.file_baton import FileBaton

    if k.shape[2] == HOSTILE:
        FileBaton(__file__).wait()  # until this file is removed
    import torch

    return plain(torch, q, k, v, scale, mask, torch.float64)

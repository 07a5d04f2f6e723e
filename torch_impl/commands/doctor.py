"""What ``lvxattn.torch_impl doctor`` knows of PyTorch; the rest is `lvxattn.cli.doctor`.

To make a process group, gloo connects every rank with every other, and waits.  So hosts are tried
before, over the store by which the ranks meet.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lvxattn.cli.doctor import RankInfo, examine, look_around
from lvxattn.cli.doctor.network import (
    Attempt,
    Listener,
    Place,
    addresses,
    listed,
    longest,
    try_connections,
    unreachable,
)
from lvxattn.cli.doctor.problems import Problem
from lvxattn.cli.doctor.rank_info import first_variable
from lvxattn.cli.doctor.report import print_places, print_problems
from lvxattn.common.launcher import number_in
from lvxattn.common.validation import check_seconds
from lvxattn.torch_impl.commands.processes import (
    THREAD_VARIABLES,
    choose_device,
    environment_of_torchrun,
    limit_threads,
    user_set_threads,
)
from lvxattn.torch_impl.commands.run import TorchRanks
from lvxattn.torch_impl.group import Group

WAIT = 30.0
"""Seconds that a rank waits for the others, unless ``LVXATTN_TIMEOUT`` says otherwise."""
_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_TAG = 7011
_BLOCK = 2**22  # bytes


class UnreachableError(RuntimeError):
    """Ranks cannot communicate; rank 0 has printed why."""


class DoctorRanks(TorchRanks):
    """The ranks of a process group as `lvxattn.cli.doctor.DoctorRanks`.

    Attributes
    ----------
    speaks : bool
    start : str
    """

    start = "torchrun --nproc-per-node 4"
    patience = timedelta(seconds=WAIT)

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.speaks = group.rank == 0
        self.left, self.right = (group.rank - 1) % group.size, (group.rank + 1) % group.size

    def mismatch(self) -> None:
        """Return nothing: `check_environment` refuses processes that cannot find one another."""

    def watching(self, what: str) -> AbstractContextManager[None]:
        """Name what is awaited in the error of the group's timeout."""
        return self.group.waiting(lambda: what)

    def exchange(self, sent: Any, received: Any) -> float:
        """Send bytes to the next rank, receive from the one before; return the seconds till then.

        Collective: every rank of the group calls this.
        """
        there, here = (None if x is None else torch.from_numpy(x) for x in (sent, received))
        return self._exchange(self.group, there, here)

    def look(self) -> RankInfo:
        """Return what this rank tells.  Collective: every rank of the group calls this."""
        return look(limit_threads(self.group))

    def send_from_device(self) -> bool:
        """Send device memory around the ring.  Collective: every rank of the group calls this."""
        device, group = choose_device("gpu", self.group)
        backend = dist.get_backend_config(group.group) if group.group is not None else ""
        if self.size == 1 or "nccl" not in str(backend):
            return True  # they go through host memory, which has been sent
        sent = torch.full((_BLOCK,), self.rank % 251, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        self._exchange(group, sent, received)
        return bool((received == self.left % 251).all())

    def _exchange(self, group: Group, sent: Tensor | None, received: Tensor | None) -> float:
        start = perf_counter()
        works: list[tuple[Any, Tensor, int]] = []
        if received is not None:
            works.append((dist.irecv, received, self.left))
        if sent is not None:
            works.append((dist.isend, sent, self.right))
        operations = [
            dist.P2POp(act, x, group=group.group, group_peer=peer, tag=_TAG)
            for act, x, peer in works
        ]
        if not operations:
            return 0.0
        first, *others = dist.batch_isend_irecv(operations)  # a single one over NCCL
        first.wait()
        if received is not None and received.device.type != "cpu":
            torch.cuda.synchronize(received.device)
        seconds = perf_counter() - start
        for work in others:
            work.wait()
        return seconds


def run_doctor(group: Group) -> int:
    """Examine the ranks; return the exit status.

    Collective: every rank of the group calls this.
    """
    return 0 if examine(DoctorRanks(group)) else 1


def look(threads: int) -> RankInfo:
    """Return what this rank tells.  Not collective.

    Parameters
    ----------
    threads : int
        As `limit_threads` returns it.
    """
    setters = [name for name in THREAD_VARIABLES if os.environ.get(name)]
    if not user_set_threads(os.environ, environment_of_torchrun()):
        setters = []
    number = number_in(os.environ, "LOCAL_RANK") or 0
    around, cuda = look_around(number), torch.version.cuda or torch.version.hip
    devices: tuple[str, ...] = ()
    versions = {"torch": str(torch.__version__)}
    obstacle = ""
    if cuda:
        versions["CUDA"] = cuda
    if torch.cuda.is_available():
        devices = tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
        obstacle = _obstacle(number % max(1, len(devices)))
        if dist.is_nccl_available():
            versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    remarks = []
    if around.gpu_files and not cuda:
        remarks.append("there are GPUs, but this build of PyTorch is for CPUs only")
    elif around.gpu_files and not devices:
        remarks.append("PyTorch finds no GPU: check the driver and CUDA_VISIBLE_DEVICES")
    return RankInfo(
        **vars(around),
        transport=("backend", "gloo, and NCCL between GPUs" if "NCCL" in versions else "gloo"),
        versions=versions,
        arrays="PyTorch",
        gpus=f"CUDA {cuda}: {', '.join(devices) or 'no GPU'}" if cuda else "built for CPUs only",
        devices=devices,
        threads=threads,
        threads_from=setters[0] if setters else "cores divided by ranks",
        interface_from=first_variable((_NCCL,) if devices else (_GLOO, _NCCL)),
        remarks=tuple(remarks),
        obstacle=obstacle,
    )


def _obstacle(device: int) -> str:
    """Return why a GPU cannot compute; empty if it can."""
    try:
        (torch.ones(1, device=f"cuda:{device}") + 1).item()
    except (AssertionError, RuntimeError) as error:  # of a build for CPUs, of CUDA
        return f"PyTorch cannot compute on GPU {device} ({str(error).splitlines()[0]})"
    return ""


def meet() -> tuple[Any, int, int]:
    """Try connections between hosts, before a group of these ranks is made.

    Collective: every rank calls this.

    Returns
    -------
    store : torch.distributed.Store
    rank, size : int

    Raises
    ------
    UnreachableError
        Ranks that gloo is to connect do not reach one another, or did not connect; on all ranks.
    """
    try:
        made = rendezvous("env://", timeout=timedelta(seconds=_patience()))
        store, rank, size = next(iter(made))
    except RuntimeError as problem:  # the store's errors are of this type
        sys.stderr.write(
            f"lvxattn: error: rank {os.environ['RANK']} on {socket.gethostname()} "
            f"({listed(addresses())}) has not met the others at {_master()} within "
            f"{_patience():g} s: {str(problem).splitlines()[0]} Was each started, with this "
            "command? Does that name lead to the host of rank 0, and no firewall close the port?\n"
        )
        raise UnreachableError from None
    _try_hosts(store, rank, size)
    return store, rank, size


def _try_hosts(store: Any, rank: int, size: int) -> None:
    """Connect to other hosts; print what fails, and raise UnreachableError on all ranks."""
    own, error = gloo_address()
    listener = Listener(rank, own)
    try:
        came = _gather(store, "place", (listener.place, error), rank, range(size))
        places = [Place(*place) for place, _ in came.values()]
        errors = [text for _, text in came.values() if text]
        if missing := sorted({*range(size)} - {*came}):
            errors.append(
                f"ranks {missing} did not connect within {_patience():g} s: were they started, "
                f"with this command, and can their hosts connect to {_master()}?"
            )
        attempts = [] if errors else try_connections(listener.place, places)
        # The first rank of each host is late by as long as its attempts take.
        tried = _gather(store, "attempts", attempts, rank, [*came], more=longest(places))
    finally:
        listener.close()
    all_attempts = [
        Attempt(Place(*source), Place(*target), address, failure)
        for some in tried.values()
        for source, target, address, failure in some
    ]
    if silent := sorted({*came} - {*tried}):
        errors.append(
            f"ranks {silent} did not say within {_patience() + longest(places):g} s which hosts "
            "they reach: have they ended?"
        )
    errors += unreachable(all_attempts, f"{_GLOO}, {_NCCL}")
    if not errors:
        return
    if rank == 0:
        print_places(places, size)
        print_problems([Problem(text, fatal=True) for text in errors])
        sys.stdout.flush()
    elif 0 not in tried:  # it prints nothing
        sys.stderr.write(
            f"lvxattn: error: rank {rank} on {socket.gethostname()}: {'; '.join(errors)}\n"
        )
    # torchrun ends all ranks as soon as one has ended, and one of them may hold the store.
    _gather(store, "printed", None, rank, [*tried], more=longest(places))
    raise UnreachableError


def _master() -> str:
    address, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"


def _patience() -> float:
    with suppress(ValueError):
        return check_seconds("LVXATTN_TIMEOUT", os.environ.get("LVXATTN_TIMEOUT")) or WAIT
    return WAIT


def _gather(
    store: Any, name: str, mine: Any, rank: int, ranks: Sequence[int], more: float = 0.0
) -> dict[int, Any]:
    """Return the objects of those of `ranks` that answer in time, `more` s later at most."""
    found: dict[int, Any] = {}
    limit = perf_counter() + _patience() + more
    with suppress(RuntimeError):  # the store has ended, with the rank that holds it
        store.set(f"doctor/{name}/{rank}", json.dumps(mine))
        for other in ranks:
            key = f"doctor/{name}/{other}"
            with suppress(dist.DistStoreError):
                store.wait([key], timedelta(seconds=max(0.1, limit - perf_counter())))
                found[other] = json.loads(store.get(key))
    return found


def gloo_address() -> tuple[str, str]:
    """Return the address at which gloo will listen, as it chooses it, or why it will not."""
    host, found = socket.gethostname(), addresses()
    if chosen := os.environ.get(_GLOO, "").split(",")[0]:
        if chosen in found or chosen == "lo":
            return found.get(chosen, "127.0.0.1"), ""
        return "", (
            f"{_GLOO}: expected an interface of {host} ({listed(found)}), got {chosen!r} (there)"
        )
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as attempt:
                attempt.bind(address)
                return str(address[0]), ""
    return "127.0.0.1", ""  # the name of this host is no address of its own

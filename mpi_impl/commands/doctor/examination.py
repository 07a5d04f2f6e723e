"""Examine every rank, send messages around the ring, find problems, print."""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import mpi4py
from mpi4py import MPI

import lvxattn
from lvxattn.common.launcher import claim, mismatch, speaks
from lvxattn.mpi_impl.commands.doctor.rank_info import (
    Link,
    RankInfo,
    look,
    send_from_device,
    send_round,
)
from lvxattn.mpi_impl.transport.cuda_aware import SELF_TEST_SECONDS
from lvxattn.mpi_impl.transport.device import limit_blas_threads, rank_on_host, use_device
from lvxattn.mpi_impl.transport.watchdog import watching

_PATIENCE = 30.0  # seconds, unless LVXATTN_TIMEOUT says otherwise


class Problem(NamedTuple):
    """A problem and its remedy in one line; `fatal` if no run is possible with these ranks."""

    text: str
    fatal: bool = False


def examine(comm: MPI.Intracomm) -> bool:
    """Examine the ranks and print a report.

    Collective: every rank of comm calls this.  The watchdog ends ranks that cannot communicate.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm

    Returns
    -------
    bool
        Whether the ranks can communicate, from GPU memory too, and compute on their GPUs; the same
        on all of them.
    """
    with watching(comm, "all ranks' environments", _PATIENCE + SELF_TEST_SECONDS):
        ranks = comm.allgather(look(limit_blas_threads(comm), rank_on_host(comm)))
    with watching(comm, "a message around the ring", _PATIENCE):
        links = comm.allgather(send_round(comm)) if comm.size > 1 else []
    arrived: list[bool] = []
    if all(info.devices and not info.obstacle for info in ranks):
        xp = import_module("cupy")
        use_device(comm, xp)
        with watching(comm, "device memory around the ring", _PATIENCE):
            arrived = comm.allgather(send_from_device(comm, xp))
    problems = find_problems(ranks, links, mismatch(os.environ, MPI.COMM_WORLD.size), arrived)
    if speaks(os.environ, comm.rank):
        _print_ranks(ranks)
        _print_links(ranks, links)
        if arrived and all(arrived):
            _line("", "device memory arrives intact around the ring")
        _print_problems(problems)
    return not any(problem.fatal for problem in problems)


def find_problems(
    ranks: Sequence[RankInfo],
    links: Sequence[Link],
    mismatch: str | None,
    arrived: Sequence[bool] = (),
) -> list[Problem]:
    """Return what is wrong, fatal problems first.

    Parameters
    ----------
    ranks : sequence of RankInfo
        In rank order.
    links : sequence of Link
    mismatch : str or None
        As `launcher.mismatch` returns it.
    arrived : sequence of bool
        For each rank, whether device memory from the rank before it arrived intact; empty if none
        was sent.
    """
    fatal = [mismatch] if mismatch else []
    fatal += [
        f"rank {link.rank} did not receive what rank {link.source} sent: this MPI installation is "
        "broken on one of their hosts; try another transport (UCX_TLS, FI_PROVIDER)"
        for link in links
        if not link.whole
    ]
    fatal += [
        f"rank {rank} did not receive what rank {(rank - 1) % len(ranks)} sent from its GPU: set "
        "LVXATTN_CUDA_AWARE=0, or try another transport (UCX_TLS)"
        for rank, whole in enumerate(arrived)
        if not whole
    ]
    obstacles = {info.obstacle: rank for rank, info in enumerate(ranks)}
    fatal += [f"{found}, on rank {rank}" for found, rank in obstacles.items() if found]
    advice = []
    for name, what in (("library", "MPI libraries"), ("versions", "versions")):
        kinds = sorted({str(getattr(info, name)) for info in ranks})
        if len(kinds) > 1:
            advice.append(f"ranks use different {what}: {'; '.join(kinds)}: use one environment")
    for host in dict.fromkeys(info.host for info in ranks):
        advice += _advice_for(host, [info for info in ranks if info.host == host])
    return [Problem(text, fatal=True) for text in fatal] + [Problem(text) for text in advice]


def _advice_for(host: str, ranks: list[RankInfo]) -> list[str]:
    problems, first = [], ranks[0]
    cores = len(frozenset().union(*(info.cores for info in ranks)))
    threads, count = sum(info.threads for info in ranks), len(ranks)
    if count > cores:
        problems.append(
            f"{host}: {_counted(count, 'rank')} on {_counted(cores, 'core')} compete for them: "
            f"start at most {cores}"
        )
    elif threads > cores:
        problems.append(
            f"{host}: {_counted(threads, 'BLAS thread')} on {_counted(cores, 'core')}: unset "
            f"{first.threads_from}, or set it to {cores // count}"
        )
    elif 2 * threads <= cores and first.threads_from.isupper():
        problems.append(
            f"{host}: most of {cores} cores are idle with {_counted(threads, 'BLAS thread')}: "
            f"unset {first.threads_from}, or set it to {cores // count}"
        )
    if not all(info.blas for info in ranks):
        problems.append(
            f"{host}: threadpoolctl does not know NumPy's BLAS: set OMP_NUM_THREADS to "
            f"{max(1, cores // count)} yourself"
        )
    if first.gpu_files and not first.cupy:
        problems.append(
            f"{host}: there are GPUs, but no CuPy: the extra cuda12 or cuda13 installs it"
        )
    elif first.cupy and not first.devices:
        problems.append(f"{host}: CuPy finds no GPU: check the driver and CUDA_VISIBLE_DEVICES")
    elif first.devices and count > (gpus := max(first.gpu_files, len(first.devices))):
        problems.append(f"{host}: {count} ranks share {_counted(gpus, 'GPU')}: start one per GPU")
    if first.devices and not all(info.cuda_aware[0] for info in ranks):
        why = next(info.cuda_aware[1] for info in ranks if not info.cuda_aware[0])
        advice = (
            "find out what the library lacks, or set LVXATTN_CUDA_AWARE=1 to override"
            if "self-test" in why
            else "a CUDA-aware MPI avoids the copies"
        )
        problems.append(
            f"{host}: MPI does not take device memory ({why}): messages go through pinned host "
            f"memory; {advice}"
        )
    if forgotten := [file for info in ranks for file in info.forgotten]:
        problems.append(
            f"{host}: MPI jobs that ended badly have left {_counted(len(forgotten), 'file')} in "
            f"shared memory, which no process uses: rm {' '.join(forgotten)}"
        )
    if first.denied:
        problems.append(
            f"{host}: LVXATTN_CUDA_AWARE=1 contradicts the library ({first.denied}): if "
            "the library is right, passes over CuPy arrays crash or receive wrong bytes"
        )
    return problems


def _print_ranks(ranks: list[RankInfo]) -> None:
    first = ranks[0]
    hosts = dict.fromkeys(info.host for info in ranks)
    print("\nLV-XAttn doctor")
    _line("lvxattn", f"{lvxattn.__version__}, {first.versions}, mpi4py {mpi4py.__version__}")
    _line("MPI", first.library)
    _line("launcher", _launcher(len(ranks)))
    _line("ranks", f"{len(ranks)} on {_counted(len(hosts), 'host')}")
    for host in hosts:
        here = [info for info in ranks if info.host == host]
        cores = len(frozenset().union(*(info.cores for info in here)))
        threads = "/".join(sorted({str(info.threads) for info in here}))
        _line(
            "",
            f"{host}: {_counted(len(here), 'rank')}, "
            f"BLAS threads of each: {threads}, cores: {cores}",
        )
    if sorted(range(len(ranks)), key=lambda r: list(hosts).index(ranks[r].host)) != list(
        range(len(ranks))
    ):
        _line("", "placed cyclically; the ring still goes host by host")
    _line("arrays", f"NumPy with {first.blas or 'an unknown BLAS'}; threads: {first.threads_from}")
    devices = ", ".join(first.devices) or "no GPU"
    _line("", f"CuPy {first.cupy}: {devices}" if first.cupy else "CuPy is not installed")
    _differing("kernel", [info.kernel for info in ranks])
    _differing(
        "CUDA-aware",
        [
            ("yes" if aware else "no") + f", by {why}"
            for aware, why in (x.cuda_aware for x in ranks)
        ],
    )


def _differing(label: str, texts: list[str]) -> None:
    """Print a text that all ranks share, or a line for each different one, with its ranks."""
    for text in filter(None, dict.fromkeys(texts)):
        those = [str(rank) for rank, other in enumerate(texts) if other == text]
        whose = "" if len(those) == len(texts) else f" on ranks {', '.join(those)}"
        _line(label, text + whose)
        label = ""


def _launcher(size: int) -> str:
    said = claim(os.environ)
    if said is not None:
        number = f"{said.variable}={said.rank if said.size is None else said.size}"
        return f"{said.launcher}: {number}"
    if size > 1:
        return "unknown"
    tasks = os.environ.get("SLURM_NTASKS")
    if tasks and tasks != "1":
        return f"none: this is one process; Slurm has allocated {tasks} tasks: start it with srun"
    return "none: this is one process, nothing is sent; start more with mpiexec -n 4"


def _print_links(ranks: list[RankInfo], links: list[Link]) -> None:
    kinds = (
        ("within hosts", [x for x in links if ranks[x.source].host == ranks[x.rank].host]),
        ("between hosts", [x for x in links if ranks[x.source].host != ranks[x.rank].host]),
    )
    label = "messages"
    for name, some in kinds:
        if some:
            slowest = max(some, key=lambda link: link.latency)
            thinnest = min(some, key=lambda link: link.bandwidth)
            _line(
                label,
                f"{name}, {_counted(len(some), 'link')}: 1 B in {1e6 * slowest.latency:.1f} us "
                f"({slowest.source} to {slowest.rank}), 4 MiB at {thinnest.bandwidth / 1e9:.2f} "
                f"GB/s ({thinnest.source} to {thinnest.rank}) on the slowest",
            )
            label = ""


def _print_problems(problems: list[Problem]) -> None:
    print()
    for problem in problems:
        print(f"  {'ERROR' if problem.fatal else 'advice'}: {problem.text}")
    if not problems:
        print("  no problems found")


def _line(label: str, text: str) -> None:
    print(f"  {label:<11} {text}")


def _counted(number: int, what: str) -> str:
    """Return ``"1 rank"``, ``"2 ranks"``."""
    return f"{number} {what}{'s' * (number != 1)}"

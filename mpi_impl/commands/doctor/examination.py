"""The examination: look at every rank, send messages round, judge, print."""

import os
from importlib import import_module

import mpi4py
from mpi4py import MPI

import lvxattn
from lvxattn.common.launcher import claim, mismatch, speaks
from lvxattn.mpi_impl.commands.doctor.advice import Problem, counted, find_problems
from lvxattn.mpi_impl.commands.doctor.rank_info import RankInfo, look
from lvxattn.mpi_impl.commands.doctor.ring import Link, send_from_device, send_round
from lvxattn.mpi_impl.transport.cuda_aware import SELF_TEST_SECONDS
from lvxattn.mpi_impl.transport.device import limit_blas_threads, rank_on_host, use_device
from lvxattn.mpi_impl.transport.watchdog import watching

_PATIENCE = 30.0  # seconds, unless LVXATTN_TIMEOUT says otherwise


def examine(comm: MPI.Intracomm) -> bool:
    """Examine the ranks and print what there is to say.

    Collective: every rank of comm calls this.  Ranks that cannot talk at all are ended by the
    watchdog.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm

    Returns
    -------
    bool
        Whether the ranks can talk, of what is on their GPUs too, and compute there; the same on all
        of them.
    """
    with watching(comm, "all ranks to say what they are", _PATIENCE + SELF_TEST_SECONDS):
        ranks = comm.allgather(look(limit_blas_threads(comm), rank_on_host(comm)))
    with watching(comm, "a message to come round", _PATIENCE):
        links = comm.allgather(send_round(comm)) if comm.size > 1 else []
    arrived: list[bool] = []
    if all(facts.devices and not facts.obstacle for facts in ranks):
        xp = import_module("cupy")
        use_device(comm, xp)
        with watching(comm, "device memory to come round", _PATIENCE):
            arrived = comm.allgather(send_from_device(comm, xp))
    problems = find_problems(ranks, links, mismatch(os.environ, MPI.COMM_WORLD.size), arrived)
    if speaks(os.environ, comm.rank):
        _print_facts(ranks)
        _print_links(ranks, links)
        if arrived and all(arrived):
            _line("", "device memory came round whole")
        _print_problems(problems)
    return not any(problem.fatal for problem in problems)


def _print_facts(ranks: list[RankInfo]) -> None:
    first = ranks[0]
    hosts = dict.fromkeys(facts.host for facts in ranks)
    print("\nLV-XAttn doctor")
    _line("lvxattn", f"{lvxattn.__version__}, {first.versions}, mpi4py {mpi4py.__version__}")
    _line("MPI", first.library)
    _line("launcher", _launcher(len(ranks)))
    _line("ranks", f"{len(ranks)} on {counted(len(hosts), 'host')}")
    for host in hosts:
        here = [facts for facts in ranks if facts.host == host]
        cores = len(frozenset().union(*(facts.cores for facts in here)))
        threads = "/".join(sorted({str(facts.threads) for facts in here}))
        _line(
            "",
            f"{host}: {counted(len(here), 'rank')}, "
            f"BLAS threads of each: {threads}, cores: {cores}",
        )
    if sorted(range(len(ranks)), key=lambda r: list(hosts).index(ranks[r].host)) != list(
        range(len(ranks))
    ):
        _line("", "placed cyclically: the ring goes host by host all the same")
    _line("arrays", f"NumPy with {first.blas or 'an unknown BLAS'}; threads: {first.threads_from}")
    devices = ", ".join(first.devices) or "no GPU"
    _line("", f"CuPy {first.cupy}: {devices}" if first.cupy else "CuPy is not installed")
    _differing("kernel", [facts.kernel for facts in ranks])
    _differing(
        "CUDA-aware",
        [
            ("yes" if aware else "no") + f", by {why}"
            for aware, why in (x.cuda_aware for x in ranks)
        ],
    )


def _differing(label: str, texts: list[str]) -> None:
    """Print what all ranks have in common, or a line for each kind, with the ranks of that kind."""
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
        return f"none: this is one process; Slurm has set {tasks} tasks aside: start it with srun"
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
                f"{name}, {counted(len(some), 'link')}: 1 B in {1e6 * slowest.latency:.1f} us "
                f"({slowest.source} to {slowest.rank}), 4 MiB at {thinnest.bandwidth / 1e9:.2f} "
                f"GB/s ({thinnest.source} to {thinnest.rank}) on the slowest",
            )
            label = ""


def _print_problems(problems: list[Problem]) -> None:
    print()
    for problem in problems:
        print(f"  {'ERROR' if problem.fatal else 'advice'}: {problem.text}")
    if not problems:
        print("  nothing to complain about")


def _line(label: str, text: str) -> None:
    print(f"  {label:<11} {text}")

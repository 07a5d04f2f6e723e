"""What is wrong with a set of ranks, and what to do about it: a line each."""

from collections.abc import Sequence
from typing import NamedTuple

from lvxattn.mpi_impl.commands.doctor.rank_info import RankInfo
from lvxattn.mpi_impl.commands.doctor.ring import Link


class Problem(NamedTuple):
    """A line of advice; `fatal` if ranks cannot talk, or cannot compute on their GPUs."""

    text: str
    fatal: bool = False


def find_problems(
    ranks: Sequence[RankInfo],
    links: Sequence[Link],
    mismatch: str | None,
    arrived: Sequence[bool] = (),
) -> list[Problem]:
    """Return what is wrong, the worst first.

    Parameters
    ----------
    ranks : sequence of RankInfo
        In rank order.
    links : sequence of Link
    mismatch : str or None
        From `launcher.mismatch`.
    arrived : sequence of bool
        Of each rank whether device memory came whole from the one before it, if any was sent.
    """
    problems = []
    if mismatch:
        problems.append(Problem(mismatch, fatal=True))
    problems += [
        Problem(
            f"rank {link.rank} did not get what rank {link.source} sent: this MPI installation is "
            "broken on one of their hosts; try another transport (UCX_TLS, FI_PROVIDER)",
            fatal=True,
        )
        for link in links
        if not link.whole
    ]
    problems += [
        Problem(
            f"rank {rank} did not get what rank {(rank - 1) % len(ranks)} sent from its GPU: set "
            "LVXATTN_CUDA_AWARE=0, or try another transport (UCX_TLS)",
            fatal=True,
        )
        for rank, whole in enumerate(arrived)
        if not whole
    ]
    problems += [
        Problem(f"{found}, on rank {rank}", fatal=True)
        for found, rank in {facts.obstacle: rank for rank, facts in enumerate(ranks)}.items()
        if found
    ]
    for name, what in (("library", "MPI libraries"), ("versions", "versions")):
        kinds = sorted({str(getattr(facts, name)) for facts in ranks})
        if len(kinds) > 1:
            problems.append(
                Problem(f"ranks use different {what}: {'; '.join(kinds)}: use one environment")
            )
    for host in dict.fromkeys(facts.host for facts in ranks):
        problems += _on_host(host, [facts for facts in ranks if facts.host == host])
    return problems


def _on_host(host: str, ranks: list[RankInfo]) -> list[Problem]:
    problems = []
    cores = len(frozenset().union(*(facts.cores for facts in ranks)))
    threads, count = sum(facts.threads for facts in ranks), len(ranks)
    if count > cores:
        problems.append(
            f"{host}: {counted(count, 'rank')} on {counted(cores, 'core')} wait for one another: "
            f"start at most {cores}"
        )
    elif threads > cores:
        problems.append(
            f"{host}: {counted(threads, 'BLAS thread')} on {counted(cores, 'core')}: unset "
            f"{ranks[0].threads_from}, or set it to {cores // count}"
        )
    elif 2 * threads <= cores and ranks[0].threads_from.isupper():
        problems.append(
            f"{host}: most of {cores} cores are idle with {counted(threads, 'BLAS thread')}: unset "
            f"{ranks[0].threads_from}, or set it to {cores // count}"
        )
    if not all(facts.blas for facts in ranks):
        problems.append(
            f"{host}: NumPy's BLAS is not one that threadpoolctl knows: set OMP_NUM_THREADS to "
            f"{max(1, cores // count)} yourself"
        )
    first = ranks[0]
    if first.gpu_files and not first.cupy:
        problems.append(
            f"{host}: there are GPUs, and no CuPy: the extra cuda12 or cuda13 brings it"
        )
    elif first.cupy and not first.devices:
        problems.append(f"{host}: CuPy finds no GPU: check the driver and CUDA_VISIBLE_DEVICES")
    elif first.devices and count > (gpus := max(first.gpu_files, len(first.devices))):
        problems.append(f"{host}: {count} ranks share {counted(gpus, 'GPU')}: start one a GPU")
    if first.devices and not all(facts.cuda_aware[0] for facts in ranks):
        why = next(facts.cuda_aware[1] for facts in ranks if not facts.cuda_aware[0])
        advice = (
            "see what the library lacks, or set LVXATTN_CUDA_AWARE=1 if you know better"
            if "self-test" in why
            else "a CUDA-aware MPI saves the copies"
        )
        problems.append(
            f"{host}: MPI takes no device memory ({why}): messages go through pinned host memory; "
            f"{advice}"
        )
    if first.denied:
        problems.append(
            f"{host}: LVXATTN_CUDA_AWARE=1 against the library's word ({first.denied}): if that is "
            "right, passes over CuPy arrays crash or get wrong bytes"
        )
    return [Problem(text) for text in problems]


def counted(number: int, what: str) -> str:
    """Return ``"1 rank"``, ``"2 ranks"``."""
    return f"{number} {what}{'s' * (number != 1)}"

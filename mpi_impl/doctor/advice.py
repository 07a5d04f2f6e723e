"""What is wrong with a set of ranks, and what to do about it: a line each."""

from collections.abc import Sequence
from typing import NamedTuple

from lvxattn.mpi_impl.doctor.facts import Facts
from lvxattn.mpi_impl.doctor.ring import Link


class Problem(NamedTuple):
    """A line of advice; `fatal` if ranks cannot talk."""

    text: str
    fatal: bool = False


def find_problems(
    ranks: Sequence[Facts],
    links: Sequence[Link],
    mismatch: str | None,
    arrived: Sequence[bool] = (),
) -> list[Problem]:
    """Return what is wrong, the worst first.

    Parameters
    ----------
    ranks : sequence of Facts
        In rank order.
    links : sequence of Link
    mismatch : str or None
        From `launcher.mismatch`.
    arrived : sequence of bool
        Of each rank whether device memory came whole from the one before it, if any was sent.
    """
    problems = []
    if mismatch:
        advice = "start the program with the launcher of the MPI that mpi4py uses, named above"
        problems.append(Problem(f"{mismatch}: {advice}", fatal=True))
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
    for name, what in (("library", "MPI libraries"), ("versions", "versions")):
        kinds = sorted({str(getattr(facts, name)) for facts in ranks})
        if len(kinds) > 1:
            problems.append(
                Problem(f"ranks use different {what}: {'; '.join(kinds)}: use one environment")
            )
    for host in dict.fromkeys(facts.host for facts in ranks):
        problems += _on_host(host, [facts for facts in ranks if facts.host == host])
    return problems


def _on_host(host: str, ranks: list[Facts]) -> list[Problem]:
    problems = []
    cores = len(frozenset().union(*(facts.cores for facts in ranks)))
    threads, count = sum(facts.threads for facts in ranks), len(ranks)
    if count > cores:
        problems.append(
            f"{host}: {count} ranks on {cores} cores wait for one another: start at most {cores}"
        )
    elif threads > cores:
        problems.append(
            f"{host}: {threads} BLAS threads on {cores} cores: unset {ranks[0].threads_from}, or "
            f"set it to {cores // count}"
        )
    elif 2 * threads <= cores and ranks[0].threads_from.isupper():
        problems.append(
            f"{host}: {threads} BLAS threads leave most of {cores} cores idle: unset "
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
        problems.append(f"{host}: {count} ranks share {gpus} GPUs: start one a GPU")
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
    if "LVXATTN_CUDA_AWARE: expected" in first.cuda_aware[1]:
        problems.append(f"{host}: {first.cuda_aware[1]}")
    return [Problem(text) for text in problems]

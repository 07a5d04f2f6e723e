"""What is wrong on one host, and what to do: cores, GPUs, shared memory, limits."""

from collections.abc import Sequence

from lvxattn.cli.doctor.rank_info import SHARED_MEMORY, RankInfo

_SHARED = 2**27  # bytes; a container has 2^26 unless it is given more
_LIMITS_FILE = (
    "/etc/security/limits.conf; Slurm passes the limits of the shell that submits, unless "
    "PropagateResourceLimits says otherwise"
)


def problems_of_host(ranks: Sequence[RankInfo], world: Sequence[RankInfo]) -> list[str]:
    """Return what is wrong on the host of some ranks of a world."""
    first = ranks[0]
    problems = [*_cores(ranks, world), *dict.fromkeys(x for info in ranks for x in info.remarks)]
    count, gpus = len(ranks), max(first.gpu_files, len(first.devices))
    if first.devices and count > gpus:
        problems.append(f"{count} ranks share {counted(gpus, 'GPU')}: start one per GPU")
    if forgotten := [file for info in ranks for file in info.forgotten]:
        problems.append(
            f"MPI jobs that ended badly have left {counted(len(forgotten), 'file')} in "
            f"shared memory, which no process uses: rm {' '.join(forgotten)}"
        )
    size, free = first.shm
    if min(size, 2 * free) < _SHARED:
        problems.append(
            f"{SHARED_MEMORY} has {_mebibytes(size)}, {_mebibytes(free)} free, and MPI, NCCL and "
            "PyTorch need more for messages within the host: start the container with "
            f"--shm-size=8g or --ipc=host, else mount -o remount,size=8g {SHARED_MEMORY}"
        )
    return problems + _limits(ranks, len(world))


def _cores(ranks: Sequence[RankInfo], world: Sequence[RankInfo]) -> list[str]:
    first, count = ranks[0], len(ranks)
    cores, threads = len(union(ranks)), sum(info.threads for info in ranks)
    offered = max(info.offered for info in ranks)
    free = "mpirun --bind-to none, mpiexec -bind-to none, srun --cpu-bind=none"
    sets: dict[frozenset[int], list[int]] = {}
    for rank, info in enumerate(world):
        if info.host == first.host:
            sets.setdefault(info.cores, []).append(rank)
    crowded = [(those, some) for some, those in sets.items() if len(those) > len(some)]
    if count > cores >= offered:
        return [
            f"{counted(count, 'rank')} on {counted(cores, 'core')} compete for them: start at "
            f"most {cores}"
        ]
    if crowded:
        those, some = crowded[0]
        return [
            f"{numbered(those)} are bound to {counted(len(some), 'core')} of {offered} "
            f"({some_of([*map(str, sorted(some))])}) and compete for it: {free}"
        ]
    if 2 * cores <= offered:
        share = offered // count
        return [
            f"{counted(count, 'rank')} bound to {cores} of {offered} cores, most are idle: give "
            f"each {share}, with mpirun --map-by slot:PE={share} or srun --cpus-per-task={share}, "
            f"or bind none: {free}"
        ]
    set_by, name = first.threads_from, first.threads_name.removesuffix("s")
    if threads > cores:
        return [
            f"{counted(threads, name)} on {counted(cores, 'core')}: unset {set_by}, or set it to "
            f"{cores // count}"
        ]
    if 2 * threads <= cores and set_by.isupper():
        return [
            f"most of {cores} cores are idle with {counted(threads, name)}: unset {set_by}, or set "
            f"it to {cores // count}"
        ]
    return []


def _limits(ranks: Sequence[RankInfo], size: int) -> list[str]:
    """Return advice on limits that are too small for this many ranks."""
    first, problems = ranks[0], []
    threads = sum(info.threads + 8 for info in ranks)  # those of libraries, too
    needs = {"open files": 128 + 2 * size, "processes": first.tasks and first.tasks + threads}
    if first.infiniband:
        needs["locked memory"] = 2**30  # which its buffers are in
    names = {"open files": ("n", "nofile"), "processes": ("u", "nproc")}
    for what, need in needs.items():
        limits = [info.limits.get(what) for info in ranks]
        limit = min((number for number in limits if number is not None), default=None)
        if limit is None or limit >= need:
            continue
        letter, word = names.get(what, ("l", "memlock"))
        enough = "unlimited" if word == "memlock" else str(max(4 * need, 2**16))
        told = _mebibytes(limit) if word == "memlock" else f"{limit:,}"
        needed = "unlimited, as InfiniBand locks its buffers" if word == "memlock" else f"{need:,}"
        problems.append(
            f"at most {told} {what} (ulimit -{letter}), and these ranks need {needed}: "
            f"`* - {word} {enough}` in {_LIMITS_FILE}"
        )
    return problems


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def union(ranks: Sequence[RankInfo]) -> frozenset[int]:
    """Return the cores of several ranks of one host."""
    return frozenset[int]().union(*(info.cores for info in ranks))


def numbered(ranks: Sequence[int]) -> str:
    """Return ``"rank 1"``, ``"ranks 1, 2"``."""
    return f"rank{'s' * (len(ranks) != 1)} {some_of([*map(str, ranks)], 8)}"


def some_of(names: list[str], most: int = 4) -> str:
    """Return the first of many names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: float, what: str) -> str:
    """Return ``"1 rank"``, ``"2 ranks"``."""
    return f"{number:.10g} {what}{'s' * (number != 1)}"

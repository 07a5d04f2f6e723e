"""The report of ``doctor``."""

import os
from collections.abc import Sequence

from lvxattn.cli.doctor.hosts import counted, union
from lvxattn.cli.doctor.network import Place, listed
from lvxattn.cli.doctor.problems import Findings, Problem, kinds_of_links
from lvxattn.cli.doctor.rank_info import LIMITS, RankInfo
from lvxattn.common.launcher import claim

_BYTES = {"locked memory", "core file"}


def print_report(
    ranks: Sequence[RankInfo], found: Findings, problems: Sequence[Problem], start: str
) -> None:
    """Print what was found.

    Parameters
    ----------
    ranks : sequence of RankInfo
        In rank order.
    found : Findings
    problems : sequence of Problem
    start : str
        What starts more processes.
    """
    print_ranks(ranks, start)
    _print_links(ranks, found)
    if found.arrived and all(found.arrived):
        _line("", "device memory arrives intact around the ring")
    if found.clocks:
        most = max(found.clocks.values(), key=lambda clock: abs(clock.offset))
        off, accuracy = abs(1e3 * most.offset), 1e3 * most.accuracy
        _line("clocks", f"at most {off:.2f} ms from {ranks[0].host}'s, measured to {accuracy:.2f}")
    print_problems(problems)


def print_ranks(ranks: Sequence[RankInfo], start: str) -> None:
    """Print what the ranks are."""
    first = ranks[0]
    hosts = list(dict.fromkeys(info.host for info in ranks))
    versions = (first.common_versions | first.versions).items()
    print("\nLV-XAttn doctor")
    _line("lvxattn", ", ".join(f"{n} {v}" for n, v in versions).removeprefix("lvxattn "))
    _line(*first.transport)
    _line("launcher", _launcher(len(ranks), start))
    _line("ranks", f"{len(ranks)} on {counted(len(hosts), 'host')}")
    for host in hosts:
        here = [info for info in ranks if info.host == host]
        threads = "/".join(sorted({str(info.threads) for info in here}))
        network = f", {listed(here[0].addresses)}" if len(hosts) > 1 else ""
        _line(
            "",
            f"{host}: {counted(len(here), 'rank')}, {first.threads_name} of each: {threads}, "
            f"cores: {len(union(here))}{network}",
        )
    places = [hosts.index(info.host) for info in ranks]
    if places != sorted(places):
        _line("", "placed cyclically; the ring still goes host by host")
    _line("arrays", f"{first.arrays}; threads: {first.threads_from}")
    _line("", first.gpus)
    for label in dict.fromkeys(label for info in ranks for label in info.details):
        _differing(label, [info.details.get(label, "") for info in ranks])
    _differing("limits", [_limits(info.limits) for info in ranks])


def print_places(places: Sequence[Place], size: int) -> None:
    """Print where ranks that have not met listen."""
    print("\nLV-XAttn doctor")
    hosts = {place.host: place for place in reversed(places)}
    _line("ranks", f"{len(places)} of {size}, on {counted(len(hosts), 'host')}")
    for host, place in sorted(hosts.items()):
        _line("", f"{host}: {listed(place.addresses)}; reachable at {place.own}")


def print_problems(problems: Sequence[Problem]) -> None:
    """Print problems and remedies, one in a line."""
    print()
    for problem in problems:
        print(f"  {'ERROR' if problem.fatal else 'advice'}: {problem.text}")
    if not problems:
        print("  no problems found")


def _differing(label: str, texts: list[str]) -> None:
    """Print a text that all ranks share, or a line for each different one, with its ranks."""
    for text in filter(None, dict.fromkeys(texts)):
        those = [str(rank) for rank, other in enumerate(texts) if other == text]
        whose = "" if len(those) == len(texts) else f" on ranks {', '.join(those)}"
        _line(label, text + whose)
        label = ""


def _limits(limits: dict[str, int | None]) -> str:
    return ", ".join(f"{what} {_limit(what, limits[what])}" for what in LIMITS if what in limits)


def _limit(what: str, limit: int | None) -> str:
    if limit is None:
        return "unlimited"
    return f"{limit / 2**20:,.0f} MiB" if what in _BYTES and limit else f"{limit:,}"


def _launcher(size: int, start: str) -> str:
    said = claim(os.environ)
    if said is not None:
        number = f"{said.variable}={said.rank if said.size is None else said.size}"
        return f"{said.launcher}: {number}"
    if size > 1:
        return "unknown"
    tasks = os.environ.get("SLURM_NTASKS")
    if tasks and tasks != "1":
        return f"none: this is one process; Slurm has allocated {tasks} tasks: start it with srun"
    return f"none: this is one process, nothing is sent; start more with {start}"


def _print_links(ranks: Sequence[RankInfo], found: Findings) -> None:
    label = "messages"
    for kind, pairs in kinds_of_links(ranks, found.links).items():
        links = [link for link, _ in pairs]
        slowest = max(links, key=lambda link: link.latency)
        thinnest = min(links, key=lambda link: link.bandwidth)
        _line(
            label,
            f"{kind}, {counted(len(links), 'link')}: 1 B in {1e6 * slowest.latency:.1f} us "
            f"({slowest.source} to {slowest.rank}), 4 MiB at {thinnest.bandwidth / 1e9:.2f} "
            f"GB/s ({thinnest.source} to {thinnest.rank}) on the slowest",
        )
        label = ""


def _line(label: str, text: str) -> None:
    print(f"  {label:<11} {text}")

"""What is wrong with a cluster, and what to do."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median_high
from typing import NamedTuple

from lvxattn.cli.doctor.hosts import counted, numbered, problems_of_host, some_of, union
from lvxattn.cli.doctor.links import Link
from lvxattn.cli.doctor.rank_info import RankInfo
from lvxattn.plan.trace import Clock

SLOWER = {"within hosts": 10.0, "between hosts": 4.0}
"""How many times slower than the median a link may be; on busy cores, messages wait for them."""
_CLOCKS = 0.1  # seconds by which clocks may differ
_OTHER_WAYS = {
    "MPI": "set LVXATTN_CUDA_AWARE=0, or try another transport (UCX_TLS)",
    "backend": "try NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1",
}


class Problem(NamedTuple):
    """A problem and its remedy in one line; `fatal` if no run is possible with these ranks."""

    text: str
    fatal: bool = False


class Findings(NamedTuple):
    """What ranks found out together.

    Attributes
    ----------
    mismatch : str or None
        As `launcher.mismatch` returns it.
    links : sequence of Link
    arrived : sequence of bool
        For each rank, whether device memory from the rank before it arrived intact; empty if none
        was sent.
    clocks : dict of Clock
        Other hosts' beside that of rank 0's.
    sees : sequence of bool
        For each rank, whether it sees rank 0's current folder as its own; empty if unknown.
    """

    mismatch: str | None = None
    links: Sequence[Link] = ()
    arrived: Sequence[bool] = ()
    clocks: Mapping[str, Clock] = {}
    sees: Sequence[bool] = ()


def find_problems(ranks: Sequence[RankInfo], found: Findings) -> list[Problem]:
    """Return what is wrong, fatal problems first.

    Parameters
    ----------
    ranks : sequence of RankInfo
        In rank order.
    found : Findings
    """
    fatal = [found.mismatch] if found.mismatch else []
    fatal += [
        f"rank {link.rank} did not receive what rank {link.source} sent: this installation is "
        "broken on one of their hosts; try another transport (UCX_TLS, FI_PROVIDER)"
        for link in found.links
        if not link.whole
    ]
    fatal += [
        f"rank {rank} did not receive what rank {(rank - 1) % len(ranks)} sent from its GPU: "
        f"{_OTHER_WAYS[ranks[rank].transport[0]]}"
        for rank, whole in enumerate(found.arrived)
        if not whole
    ]
    obstacles = {info.obstacle: rank for rank, info in enumerate(ranks)}
    fatal += [f"{text}, on rank {rank}" for text, rank in obstacles.items() if text]
    advice = [*_versions(ranks), *_slow(ranks, found.links), *_clocks(found.clocks, ranks[0].host)]
    advice += [*_files(ranks, found.sees), *_interfaces(ranks), *_shares(ranks)]
    for host in dict.fromkeys(info.host for info in ranks):
        those = [info for info in ranks if info.host == host]
        advice += [f"{host}: {text}" for text in problems_of_host(those, ranks)]
    return [Problem(text, fatal=True) for text in fatal] + [Problem(text) for text in advice]


def by_value(ranks: Sequence[RankInfo], value: Callable[[RankInfo], str]) -> dict[str, str]:
    """Return who has which value: ``{"3.11": "host0", "3.12": "ranks 2, 3 on host1"}``."""
    found: dict[str, dict[str, list[int]]] = {}
    for rank, info in enumerate(ranks):
        found.setdefault(value(info), {}).setdefault(info.host, []).append(rank)
    sizes = {info.host: 0 for info in ranks}
    for info in ranks:
        sizes[info.host] += 1
    return {
        text: some_of(
            [
                host if len(those) == sizes[host] else f"{numbered(those)} on {host}"
                for host, those in hosts.items()
            ]
        )
        for text, hosts in found.items()
    }


def kinds_of_links(
    ranks: Sequence[RankInfo], links: Sequence[Link]
) -> dict[str, list[tuple[Link, float]]]:
    """Return links within and between hosts, each with how much slower it is than their median."""
    found = {}
    for kind in SLOWER:
        those = [
            link
            for link in links
            if (ranks[link.source].host == ranks[link.rank].host) == (kind == "within hosts")
        ]
        if those:
            # Of two links the faster: one of them is the slow one.
            typical = median_high(link.bandwidth for link in those)
            found[kind] = [(link, typical / link.bandwidth) for link in those]
    return found


def slow_links(ranks: Sequence[RankInfo], links: Sequence[Link]) -> list[tuple[Link, float]]:
    """Return the links that are much slower than others of their kind, and how much."""
    kinds = kinds_of_links(ranks, links)
    return [pair for kind, pairs in kinds.items() for pair in pairs if pair[1] > SLOWER[kind]]


def _versions(ranks: Sequence[RankInfo]) -> list[str]:
    kinds: dict[str, Callable[[RankInfo], str]] = {
        f"different {ranks[0].transport[0]} libraries": lambda info: info.transport[1]
    }
    for name in dict.fromkeys(name for info in ranks for name in _all_versions(info)):
        kinds[f"different versions of {name}"] = lambda info, name=name: _all_versions(info).get(  # type: ignore[misc]
            name, "none"
        )
    lines = []
    for what, value in kinds.items():
        if len(found := by_value(ranks, value)) > 1:
            each = "; ".join(f"{text} on {who}" for text, who in found.items())
            lines.append(f"ranks use {what}: {each}: use one environment on all hosts")
    if lines:
        return lines
    coded = [info for info in ranks if info.code]
    if len(found := by_value(coded, lambda info: info.code)) > 1:
        each = "; ".join(found.values())
        lines.append(
            f"the package's files differ between {each}, though the version is the same: install "
            "one commit on all hosts, or on a file system that they share"
        )
    if len(found := by_value(ranks, lambda info: info.prefix)) > 1:
        each = "; ".join(f"{text} on {who}" for text, who in found.items())
        lines.append(f"ranks use different Python environments: {each}: activate one of them")
    return lines


def _all_versions(info: RankInfo) -> dict[str, str]:
    return info.common_versions | info.versions


def _slow(ranks: Sequence[RankInfo], links: Sequence[Link]) -> list[str]:
    return [
        f"the link from rank {link.source} on {ranks[link.source].host} to rank {link.rank} on "
        f"{ranks[link.rank].host} is {ratio:.0f} times slower than the median of its kind: "
        f"{link.bandwidth / 1e9:.3g} GB/s; look for a port or cable at a lower rate, another job, "
        "or another interface on one of the hosts, or leave it out"
        for link, ratio in slow_links(ranks, links)
    ]


def _clocks(clocks: Mapping[str, Clock], first: str) -> list[str]:
    lines = []
    for host, clock in clocks.items():
        if abs(clock.offset) - clock.accuracy > _CLOCKS:
            which = "ahead of" if clock.offset > 0 else "behind"
            lines.append(
                f"{host}'s clock is {abs(clock.offset):.3g} s {which} {first}'s: synchronize them "
                "(chronyd or ntpd), or file times and logs mislead"
            )
    return lines


def _files(ranks: Sequence[RankInfo], sees: Sequence[bool]) -> list[str]:
    without = [info.host for info, it in zip(ranks, sees, strict=False) if not it]
    if not without:
        return []
    hosts = some_of([*dict.fromkeys(without)])
    folders = some_of([*dict.fromkeys(info.folder for info in ranks if info.host in without)])
    return [
        f"{hosts} (in {folders}) does not see {ranks[0].host}'s current folder, {ranks[0].folder}: "
        "start in a folder on a file system that all hosts share, or files for --input are not "
        "found there"
    ]


def _interfaces(ranks: Sequence[RankInfo]) -> list[str]:
    if any(info.interface_from for info in ranks):
        return []
    owners: dict[tuple[str, str], list[str]] = {}
    for host, info in {info.host: info for info in reversed(ranks)}.items():
        for pair in info.addresses.items():
            owners.setdefault(pair, []).insert(0, host)
    return [
        f"{name} has the address {address} on {some_of(hosts)}: it does not lead from one to the "
        "other; select the interface between hosts: FI_TCP_IFACE, UCX_NET_DEVICES or "
        "OMPI_MCA_btl_tcp_if_include for MPI, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for PyTorch"
        for (name, address), hosts in owners.items()
        if len(hosts) > 1
    ]


def _shares(ranks: Sequence[RankInfo]) -> list[str]:
    """Return advice if hosts have different numbers of cores for each rank."""
    share = {}
    for host in dict.fromkeys(info.host for info in ranks):
        those = [info for info in ranks if info.host == host]
        share[host] = len(union(those)) / len(those)
    least, most = min(share, key=share.__getitem__), max(share, key=share.__getitem__)
    if share[most] < 1.5 * share[least]:
        return []
    return [
        f"a rank has {counted(round(share[least], 2), 'core')} on {least}, {share[most]:.3g} on "
        f"{most}: all wait for the slowest; start ranks in proportion to cores, and bind them alike"
    ]

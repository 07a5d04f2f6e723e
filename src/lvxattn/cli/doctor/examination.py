"""Examine every rank, send messages around the ring, find problems, print."""

from typing import Protocol

from lvxattn.cli.doctor.links import (
    Exchanging,
    clocks_of_hosts,
    faster,
    measure_links,
    sees_folder,
)
from lvxattn.cli.doctor.problems import Findings, find_problems, slow_links
from lvxattn.cli.doctor.rank_info import RankInfo
from lvxattn.cli.doctor.report import print_report

# A link that appears slow is measured again: another program may have been in the way.
_AGAIN = 2


class DoctorRanks(Exchanging, Protocol):
    """What an implementation provides to the doctor."""

    @property
    def start(self) -> str:
        """What starts more processes."""

    @property
    def speaks(self) -> bool:
        """Whether this process prints."""

    def look(self) -> RankInfo:
        """Return what this rank tells.  Collective: every rank calls this."""

    def mismatch(self) -> str | None:
        """Return an error message if the launcher does not fit."""

    def send_from_device(self) -> bool:
        """Send device memory around the ring; return whether it arrived intact.

        Collective: every rank calls this, if every rank can compute on its GPU.
        """


def examine(ranks: DoctorRanks) -> bool:
    """Examine the ranks and print a report.

    Collective: every rank calls this.  The waits of `ranks` are limited: ranks that cannot
    communicate end.

    Parameters
    ----------
    ranks : DoctorRanks

    Returns
    -------
    bool
        Whether the ranks can communicate, from GPU memory too, and compute on their GPUs; the same
        on all of them.
    """
    infos = ranks.allgather(ranks.look())
    hosts = [info.host for info in infos]
    found = Findings(ranks.mismatch())
    if ranks.size > 1:
        links = measure_links(ranks)
        for _ in range(_AGAIN):
            if slow_links(infos, links):
                links = faster(links, measure_links(ranks))
        found = found._replace(links=links)
    if len({*hosts}) > 1:
        found = found._replace(clocks=clocks_of_hosts(ranks, hosts), sees=sees_folder(ranks))
    if all(info.devices and not info.obstacle for info in infos):
        found = found._replace(arrived=ranks.allgather(ranks.send_from_device()))
    problems = find_problems(infos, found)
    if ranks.speaks:
        print_report(infos, found, problems, ranks.start)
    return not any(problem.fatal for problem in problems)

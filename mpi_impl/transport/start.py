"""A limit for the start of MPI, which connects hosts in some libraries, and waits for ever.

MPI starts when mpi4py is imported, and no thread of Python runs meanwhile.  So a child watches:

    rank   |-- MPI_Init ... ----------------------------x
    child  |---- LVXATTN_TIMEOUT or 30 s ----| prints, waits for the other ranks' lines, kills
"""

import os
import signal
import socket
import sys
import time
import warnings
from contextlib import suppress

from lvxattn.common.launcher import claim
from lvxattn.common.processes import end_with_parent
from lvxattn.common.shared_memory import unlink_own_file
from lvxattn.common.validation import check_seconds

PATIENCE = 30.0
"""Seconds that a wait of ``doctor`` may take, unless ``LVXATTN_TIMEOUT`` says otherwise."""
INTERFACES = (
    "FI_TCP_IFACE",
    "UCX_NET_DEVICES",
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_btl_tcp_if_exclude",
)
_GRACE = 2.0  # seconds for other ranks' lines


def start(limited: str) -> None:
    """Start MPI; its time is limited if this process is to run a command.

    Parameters
    ----------
    limited : str
        The command.
    """
    # Python's own arguments: the program's are not there yet.
    before, _, command = " ".join(sys.orig_argv).partition(" lvxattn.mpi_impl ")
    if not before or command.split()[:1] != [limited]:
        return
    from lvxattn.cli.doctor import network  # noqa: F401 - imported here, not by the child

    rank = os.getpid()
    with warnings.catch_warnings():
        # BLAS has threads, and the child calls nothing of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            _watch(rank)
        finally:
            os._exit(0)
    try:
        from mpi4py import MPI  # noqa: F401 - which starts it
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def network_hint() -> str:
    """Return what may be wrong if no message comes from another host, and what to set."""
    from lvxattn.cli.doctor.network import addresses, listed
    from lvxattn.cli.doctor.rank_info import first_variable

    return (
        f"This is {socket.gethostname()}, with {listed(addresses())}. If other ranks are on other "
        "hosts: a firewall between them (MPI connects to ports of any number; libfabric's are "
        "limited by FI_TCP_PORT_LOW_RANGE and FI_TCP_PORT_HIGH_RANGE, Open MPI's by "
        "OMPI_MCA_btl_tcp_port_min_v4), or an interface that does not lead there: select one by "
        f"{', '.join(INTERFACES[:3])} (now: {first_variable(INTERFACES) or 'none is set'})"
    )


def _watch(rank: int) -> None:
    end_with_parent(rank)
    seconds = PATIENCE
    with suppress(ValueError):  # reported once MPI has started
        seconds = check_seconds("LVXATTN_TIMEOUT", os.environ.get("LVXATTN_TIMEOUT")) or PATIENCE
    time.sleep(seconds)
    if os.getppid() != rank:  # it has ended
        return
    said = claim(os.environ)
    who = "a rank" if said is None else f"rank {said.rank} of {said.size or 'several'}"
    text = f"{who} has waited {seconds:g} s for the other ranks, for MPI to start. {network_hint()}"
    text += "; or they start slowly: set LVXATTN_TIMEOUT to more"
    os.write(2, f"{text}\n".encode())
    unlink_own_file(rank)
    time.sleep(_GRACE)
    if os.getppid() == rank:  # else its number may be another's
        os.kill(rank, signal.SIGKILL)

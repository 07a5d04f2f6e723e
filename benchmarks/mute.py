"""A communicator whose messages cost nothing: what a run would take with communication off."""

from typing import Any

from mpi4py import MPI


class MuteComm:
    """Stands in for a communicator, with messages that are over when they have begun.

    An implementation that is handed one does everything that it does otherwise: the same tiles, in
    calls of the same number and shapes, with the same merges, buffers and requests.  Only nothing
    is sent.  What a rank "receives" is what it sends, so that it computes with numbers of the usual
    size and not with whatever lies in memory; for this a message is copied once inside the rank.
    Results are wrong, and ranks must hold shares of one size.

    Parameters
    ----------
    comm : MPI.Intracomm
        Whose rank and size it shows; the layout is to be agreed on over that one.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._posted: dict[int, Any] = {}

    def Irecv(self, buffer: list[Any], source: int, tag: int) -> MPI.Request:  # noqa: ARG002
        """Remember where a message is to go; the request is complete."""
        self._posted[tag] = buffer[0]
        return MPI.Request()

    def Isend(self, buffer: list[Any], dest: int, tag: int) -> MPI.Request:  # noqa: ARG002
        """Put the message where one was asked for; the request is complete."""
        self._posted.pop(tag)[...] = buffer[0]
        return MPI.Request()

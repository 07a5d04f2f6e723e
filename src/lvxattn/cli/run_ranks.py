"""The interface of an implementation to the commands: communication, and arrays on a device."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from lvxattn.cli.tensors import Array, InputError
from lvxattn.common.free_memory import check_memory
from lvxattn.common.meter import Meter
from lvxattn.common.validation import Communicator, raise_together
from lvxattn.plan.choose import Layout
from lvxattn.plan.machine import Machine

T = TypeVar("T")


class Backend(Protocol):
    """The device of one rank, and its attention; `Any` is an array on the device."""

    @property
    def device(self) -> str:
        """The device's name."""

    def put(self, x: Array) -> Any:
        """Copy a NumPy array to the device."""

    def get(self, x: Any) -> Array:
        """Copy an array from the device."""

    def finish(self) -> None:
        """Wait until the device is idle."""

    def agree(
        self,
        tensors: dict[str, Any],
        *,
        schedule: str,
        scale: float | None,
        grid: tuple[int, int] | None,
        machine: Machine | None,
    ) -> Layout:
        """Return the layout of these tensors.

        Collective: every rank calls this.

        Raises
        ------
        ValueError, TypeError
            The ranks' arguments do not fit; the same on all ranks.
        """

    def kernel(self, tensors: dict[str, Any]) -> str:
        """Return which kernel computes blocks such as this rank's, and why; empty if there is one.

        To be called after `agree`, which raises its errors.
        """

    def forward(self, tensors: dict[str, Any], layout: Layout, meter: Meter) -> dict[str, Any]:
        """Return out and lse.

        Collective: every rank calls this.

        Parameters
        ----------
        tensors : dict
            This rank's, by name: q, k, v and, if present, mask and dout; with dout a backward
            follows.
        layout : Layout
        meter : Meter
        """

    def backward(
        self, tensors: dict[str, Any], results: dict[str, Any], layout: Layout, meter: Meter
    ) -> dict[str, Any]:
        """Return dq, dk and dv, given the results of `forward`.

        Collective: every rank calls this.
        """


class Ranks(Communicator, Protocol):
    """The ranks of a run, as one of them sees them."""

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process; stdout may then look like a terminal."""

    def limit_threads(self) -> int:
        """Give each rank its share of its host's cores; return its number of threads.

        Collective: every rank calls this.
        """

    def backend(self, wish: str, dtype: str) -> Backend:
        """Return the backend on this rank's device.

        Collective: every rank calls this.

        Parameters
        ----------
        wish : str
            ``"cpu"``, ``"gpu"`` or ``"auto"``.
        dtype : str
            Of the tensors.

        Raises
        ------
        InputError
            There is no such device for every rank; the same on all ranks.
        """

    def start_together(self) -> None:
        """Wait for all ranks.

        Collective: every rank calls this.
        """

    def send(self, number: float, dest: int) -> None:
        """Send a number to a rank that calls `receive`."""

    def receive(self, source: int) -> float:
        """Wait for a number from a rank that calls `send`."""


def on_rank_0(work: Callable[[], T], ranks: Ranks) -> T:
    """Run a function on rank 0; return its result, or raise its error, on all ranks.

    Collective: every rank calls this.

    Raises
    ------
    InputError
    """
    mine = together(lambda: work() if ranks.rank == 0 else None, ranks)
    return cast(T, ranks.allgather(mine)[0])


def together(work: Callable[[], T], ranks: Ranks) -> T:
    """Run a function on every rank; if it fails on one of them, raise its error on all.

    Collective: every rank calls this.

    Raises
    ------
    InputError
        In place of an OSError, too.
    """
    result, error = None, None
    try:
        result = work()
    except (InputError, OSError) as problem:
        text = str(problem)
        if isinstance(problem, OSError) and problem.filename:
            text = f"{problem.filename}: {problem.strerror}"  # without the number
        error = InputError(text)
    raise_together(error, ranks)
    return cast(T, result)


def check_room(need: float, ranks: Communicator, change: str) -> str:
    """Return what `check_memory` says.  Collective: every rank calls this.

    Raises
    ------
    InputError
        In place of a MemoryError.
    """
    try:
        return check_memory(need, ranks, change)
    except MemoryError as error:  # the same on all ranks
        raise InputError(str(error)) from None

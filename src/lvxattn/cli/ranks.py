"""What differs in kind between command lines: who talks to whom, with what arrays they compute."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from lvxattn.cli.tensors import Array
from lvxattn.common.meter import Meter
from lvxattn.common.validation import Communicator
from lvxattn.plan.choose import Layout
from lvxattn.plan.machine import Machine


class Backend(Protocol):
    """Where one rank computes, and its attention; `Any` is an array of that place."""

    @property
    def device(self) -> str:
        """Its name."""

    def put(self, x: Array) -> Any:
        """Bring a NumPy array there."""

    def get(self, x: Any) -> Array:
        """Bring an array back."""

    def finish(self) -> None:
        """Wait until everything is computed."""

    def agree(
        self,
        tensors: dict[str, Any],
        *,
        schedule: str,
        scale: float | None,
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
        """Say which kernel attends to blocks such as this rank's, and why; empty if there is one.

        After `agree`, which raises what is wrong with it.
        """

    def forward(self, tensors: dict[str, Any], layout: Layout, meter: Meter) -> dict[str, Any]:
        """Return out and lse.

        Collective: every rank calls this.

        Parameters
        ----------
        tensors : dict
            This rank's, by name: q, k, v and, where there are, mask and dout; with dout a backward
            follows.
        layout : Layout
        meter : Meter
            Is added to.
        """

    def backward(
        self, tensors: dict[str, Any], results: dict[str, Any], layout: Layout, meter: Meter
    ) -> dict[str, Any]:
        """Return dq, dk and dv of what `forward` returned for the same arguments.

        Collective: every rank calls this.
        """


class Ranks(Communicator, Protocol):
    """The ranks of a run, seen from one of them."""

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process: stdout may then look like a terminal."""

    def limit_threads(self) -> int:
        """Give each rank its share of its host's cores; return how many threads it uses.

        Collective: every rank calls this.
        """

    def backend(self, wish: str, dtype: str) -> Backend:
        """Give each rank a device.

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
            The wish cannot be fulfilled; the same on all ranks.
        """

    def start_together(self) -> None:
        """Wait for all ranks.

        Collective: every rank calls this.
        """

    def send(self, number: float, dest: int) -> None:
        """Send a number to a rank that calls `receive`."""

    def receive(self, source: int) -> float:
        """Wait for a number from a rank that calls `send`."""

    def watching(self, what: str) -> AbstractContextManager[None]:
        """Watch one wait for all ranks; `what` says what for."""

"""Rates and latencies of machines, from which a plan's seconds are computed.

Presets are published figures, with matmuls at the share of the peak that attention kernels reach;
`lvxattn.plan.measure` measures the machine at hand.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from sys import float_info
from typing import Any

from lvxattn.common.new_file import write_file
from lvxattn.common.regular_file import open_regular, printable
from lvxattn.common.validation import FLOATING

VERSION = 4


@dataclass(frozen=True)
class Link:
    """A link between two ranks.

    Attributes
    ----------
    bandwidth : float
        Bytes a second, in one direction.
    latency : float
        Seconds that an empty message takes.
    busy : float
        Fraction, from 0 to 1, of a message's time in which its receiver cannot compute: near 1
        where ranks copy it themselves, as in shared memory.
    """

    bandwidth: float
    latency: float
    busy: float = 0.0


@dataclass(frozen=True)
class Measured:
    """The problem that a machine was measured with; others may reach other figures.

    Attributes
    ----------
    by : str
        The implementation, such as ``"mpi_impl"``.
    device : str
        Where ranks compute.
    H, H_KV, D : int
        Query heads, key-value heads, and their width.
    dtype : str
    """

    by: str
    device: str
    H: int
    H_KV: int
    D: int
    dtype: str

    def __str__(self) -> str:
        """Format in one line."""
        return (
            f"{self.H}/{self.H_KV} heads of {self.D} in {self.dtype}, by {self.by} on {self.device}"
        )

    def compared_with(self, whose: str, heads: tuple[int, int, int], dtype: str) -> str:
        """Format in one line, with how another problem differs.

        Parameters
        ----------
        whose : str
            Names the other problem, such as ``"the plan"``.
        heads : (H, H_KV, D)
        dtype : str
        """
        differences = []
        if heads != (self.H, self.H_KV, self.D):
            differences += ["other heads"]
        if dtype != self.dtype:
            differences += ["another dtype"]
        return f"{self}; {whose} has {' and '.join(differences)}" if differences else str(self)

    def check(self, where: str) -> None:
        """Validate the values, as `Machine.check`."""
        for name in ("by", "device"):
            text = getattr(self, name)
            _check(isinstance(text, str), "a text", f"measured.{name}", where, text)
        for name in ("H", "H_KV", "D"):
            n = getattr(self, name)
            _check(type(n) is int and n > 0, "an int above 0", f"measured.{name}", where, n)
        known = self.dtype in FLOATING
        _check(known, f"one of {FLOATING}", "measured.dtype", where, self.dtype)


@dataclass(frozen=True)
class Machine:
    """A cluster of equal hosts, as its ranks see it.

    Attributes
    ----------
    name : str
    matmul : float
        Floating-point operations a second that a rank's attention reaches on large blocks.
    memory : float
        Bytes a second at which a rank reads keys and values; with few queries it is the limit.
    start : float
        Seconds that a block takes however small it is, forward and backward in the mean.
    room : float
        Bytes of memory of a rank.
    inside : Link
        Between ranks of one host.
    between : Link
        Between hosts; a host's ranks share it.
    ranks_per_host, ranks : int
        Numbers of ranks.
    copy : float
        Bytes a second at which a rank copies into memory that it holds.
    call : float
        Overhead of a pass in seconds, regardless of the sizes of its blocks and of messages.
    hiding : float
        Fraction, from 0 to 1, of the shorter one of arithmetic and reading that overlaps with the
        longer one.
    message : float
        Seconds that a rank works for each message that it sends, and for each that it receives,
        besides copying it.
    message_at_once : float
        The same for the messages of a collective, which a rank waits for together.
    matmul_backward, memory_backward : float or None
        The rates of a backward, which has 5 products for 2 and reads and writes 3 times as much;
        None where they are those of a forward.
    copy_new : float or None
        Bytes a second at which a rank copies into memory that its allocator takes from the system
        for every array; None where that is `copy`, as where the allocator keeps memory.
    measured : Measured or None
        The problem it was measured with; None for published or invented figures.

    Examples
    --------
    >>> MACHINES["h200"].room
    141000000000.0
    >>> MACHINES["h200"].check()
    """

    name: str
    matmul: float
    memory: float
    start: float
    room: float
    inside: Link
    between: Link
    ranks_per_host: int
    ranks: int
    copy: float
    call: float
    hiding: float = 1.0
    message: float = 0.0
    message_at_once: float = 0.0
    matmul_backward: float | None = None
    memory_backward: float | None = None
    copy_new: float | None = None
    measured: Measured | None = None

    def save(self, path: str | Path) -> None:
        """Write the machine as JSON.

        Parameters
        ----------
        path : str

        Raises
        ------
        OSError
            The file cannot be written; it names the file, which is as it was before.
        """
        write_file(path, json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> "Machine":
        """Read what `save` wrote.

        Parameters
        ----------
        path : str

        Returns
        -------
        Machine

        Raises
        ------
        ValueError
            The file is not a machine file, is damaged, or has another version.
        OSError
            The file cannot be read.
        """
        expected = "machine: expected a file that measure or Machine.save wrote"
        try:
            with open_regular(path) as file:
                found = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{expected}, got {path}, which is not JSON: {error}") from None
        if not isinstance(found, dict) or "version" not in found:
            raise ValueError(f"{expected}, got {path}, which has no version")
        got = found.pop("version")
        if got != VERSION or isinstance(got, bool):
            raise ValueError(
                f"machine: expected version {VERSION} in {path}, got {got!r:.80}: measure it again"
            )
        try:
            machine = Machine.of(found)
        except (TypeError, KeyError) as error:
            text = f"{expected}, got {path}, which is damaged: {printable(str(error))}"
            raise ValueError(text) from None
        machine.check(str(path))
        return machine

    @staticmethod
    def of(figures: dict[str, Any]) -> "Machine":
        """Return the machine of which `dataclasses.asdict` returned these values.

        Parameters
        ----------
        figures : dict

        Returns
        -------
        Machine

        Raises
        ------
        TypeError, KeyError
            A value is missing or unknown.
        """
        parts: dict[str, Any] = {name: Link(**figures[name]) for name in ("inside", "between")}
        if figures.get("measured") is not None:
            parts["measured"] = Measured(**figures["measured"])
        return Machine(**{**figures, **parts})

    def check(self, where: str = "machine") -> None:
        """Validate the values.

        Parameters
        ----------
        where : str
            Names the machine, or its file, in the error.

        Raises
        ------
        ValueError
        """
        _check(isinstance(self.name, str), "a text", "name", where, self.name)
        rates = {name: getattr(self, name) for name in ("matmul", "memory", "room", "copy")}
        times = {
            name: getattr(self, name) for name in ("start", "call", "message", "message_at_once")
        }
        for name in ("matmul_backward", "memory_backward", "copy_new"):
            if getattr(self, name) is not None:
                rates[name] = getattr(self, name)
        fractions = {"hiding": self.hiding}
        counts = {"ranks_per_host": self.ranks_per_host, "ranks": self.ranks}
        for name, link in (("inside", self.inside), ("between", self.between)):
            _check(isinstance(link, Link), "a Link", name, where, link)
            rates[f"{name}.bandwidth"], times[f"{name}.latency"] = link.bandwidth, link.latency
            fractions[f"{name}.busy"] = link.busy
        for name, x in (rates | counts).items():
            _check(_is_number(x) and x > 0, "a number above 0", name, where, x)
        for name, n in counts.items():
            _check(isinstance(n, int), "an int", name, where, n)
        for name, x in times.items():
            _check(_is_number(x) and x >= 0, "a number from 0 up", name, where, x)
        for name, x in fractions.items():
            between = _is_number(x) and 0 <= x <= 1
            _check(between, "a number from 0 to 1", name, where, x)
        if self.measured is not None:
            self.measured.check(where)


def _check(valid: bool, expected: str, name: str, where: str, got: Any) -> None:
    if not valid:
        raise ValueError(f"machine: expected {expected} for {name} in {where}, got {got!r:.80}")


def _is_number(x: Any) -> bool:
    """Return whether x is a finite number; JSON has integers that no float can hold."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= float_info.max


def machine_of(text: str) -> Machine:
    """Return the machine that a command line names.

    Parameters
    ----------
    text : str
        One of `MACHINES`, or a file that `Machine.save` wrote.

    Returns
    -------
    Machine

    Raises
    ------
    ValueError
        The text is neither a preset nor a readable machine file.  The message does not begin with
        an argument's name: the command line adds that.

    Examples
    --------
    >>> machine_of("h100").ranks_per_host
    8
    """
    if text in MACHINES:
        return MACHINES[text]
    try:
        return Machine.load(text)
    except FileNotFoundError:
        raise ValueError(
            f"expected one of {', '.join(MACHINES)}, or a file, got {text!r}"
        ) from None
    except OSError as error:
        raise ValueError(f"{text}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(str(error).removeprefix("machine: ")) from None


_NVLINK3, _NVLINK4 = Link(250e9, 5e-6), Link(400e9, 5e-6)
_PCIE4, _PORT, _PORTS = Link(25e9, 1e-5), Link(25e9, 1e-5), Link(8 * 48e9, 5e-6)

# A copy reads and writes; 100 us is what Python takes to prepare a pass.
MACHINES = {
    machine.name: machine
    for machine in (
        # The paper's clusters: 16 A100 80 GB on 4 nodes; 8 A30 on 8; 12 A100 40 GB.
        Machine("a100-16", 187e12, 1.6e12, 2e-5, 80e9, _NVLINK3, _PORT, 4, 16, 0.8e12, 1e-4),
        Machine("a30-8", 99e12, 0.75e12, 2e-5, 24e9, _PCIE4, Link(1.25e9, 3e-5), 1, 8,
                0.37e12, 1e-4),
        Machine("a100-12", 187e12, 1.2e12, 2e-5, 40e9, _NVLINK3, _PORT, 4, 12, 0.6e12, 1e-4),
        # DGX-like hosts of 8, one 400 Gbit/s InfiniBand port a GPU.
        Machine("h100", 590e12, 2.7e12, 2e-5, 80e9, _NVLINK4, _PORTS, 8, 16, 1.3e12, 1e-4),
        Machine("h200", 590e12, 3.8e12, 2e-5, 141e9, _NVLINK4, _PORTS, 8, 16, 1.9e12, 1e-4),
    )
}  # fmt: skip

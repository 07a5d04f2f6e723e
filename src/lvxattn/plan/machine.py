"""How fast a machine computes and talks: what a plan's seconds rest on.

Presets are of published figures, with matmuls at the share of the peak that attention kernels
reach; `lvxattn.plan.measure` measures the machine at hand.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from sys import float_info
from typing import Any

from lvxattn.plan.measured import Measured

VERSION = 3


@dataclass(frozen=True)
class Link:
    """A way between ranks.

    Attributes
    ----------
    bandwidth : float
        Bytes a second, in one direction.
    latency : float
        Seconds that a message of no length takes.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """A cluster of like hosts, seen from its ranks.

    Attributes
    ----------
    name : str
    matmul : float
        Floating-point operations a second that a rank's attention reaches on large blocks.
    memory : float
        Bytes a second that a rank reads keys and values at; few queries are as slow as that.
    start : float
        Seconds that a block takes however small it is.
    room : float
        Bytes of memory a rank has.
    inside : Link
        From a rank to another one of its host.
    between : Link
        From a host to another one; the host's ranks share it.
    ranks_per_host, ranks : int
        How many there are.
    copy : float
        Bytes a second that a rank copies at, into memory that is new to it.
    call : float
        Seconds that a pass takes beside its blocks, however small they are.
    hiding : float
        How much of the shorter one of arithmetic and reading the longer one hides, from 0 to 1.
    measured : Measured or None
        With what; None where the figures are published ones, or made up.
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
    measured: Measured | None = None

    def save(self, path: str | Path) -> None:
        """Write the figures as JSON.

        Parameters
        ----------
        path : str
        """
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        Path(path).write_text(text + "\n")

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
            It is no such file, damaged, or of another version.
        OSError
            It cannot be read.
        """
        expected = "machine: expected a file that measure or Machine.save wrote"
        try:
            found = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{expected}, got {path}, which is no JSON: {error}") from None
        if not isinstance(found, dict) or "version" not in found:
            raise ValueError(f"{expected}, got {path}, which says no version")
        got = found.pop("version")
        if got != VERSION or isinstance(got, bool):
            raise ValueError(
                f"machine: expected version {VERSION} in {path}, got {got!r}: measure it again"
            )
        try:
            machine = Machine.of(found)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{expected}, got {path}, which is damaged: {error}") from None
        machine.check(str(path))
        return machine

    @staticmethod
    def of(figures: dict[str, Any]) -> "Machine":
        """Return the machine of which `dataclasses.asdict` gave these figures.

        Parameters
        ----------
        figures : dict

        Returns
        -------
        Machine

        Raises
        ------
        TypeError, KeyError
            Some are missing, or there are others.
        """
        parts: dict[str, Any] = {name: Link(**figures[name]) for name in ("inside", "between")}
        if figures.get("measured") is not None:
            parts["measured"] = Measured(**figures["measured"])
        return Machine(**{**figures, **parts})

    def check(self, where: str = "machine") -> None:
        """Refuse figures that nothing can be computed from.

        Parameters
        ----------
        where : str
            What the error is to name.

        Raises
        ------
        ValueError
        """
        if not isinstance(self.name, str):
            raise ValueError(f"machine: expected a text for name in {where}, got {self.name!r}")
        rates = {"matmul": self.matmul, "memory": self.memory, "room": self.room}
        rates["copy"], times = self.copy, {"start": self.start, "call": self.call}
        for name, link in (("inside", self.inside), ("between", self.between)):
            if not isinstance(link, Link):
                raise ValueError(f"machine: expected a Link for {name} in {where}, got {link!r}")
            rates[f"{name}.bandwidth"], times[f"{name}.latency"] = link.bandwidth, link.latency
        counts = {"ranks_per_host": self.ranks_per_host, "ranks": self.ranks}
        rates |= counts
        for name, x in (rates | times | {"hiding": self.hiding}).items():
            number = isinstance(x, int | float) and not isinstance(x, bool)
            most = 1 if name == "hiding" else float_info.max  # JSON knows integers beyond that
            if not (number and 0 <= x <= most) or (name in rates and x == 0):
                span = "above 0" if name in rates else "from 0 up"
                span = "from 0 to 1" if name == "hiding" else span
                raise ValueError(
                    f"machine: expected a number {span} for {name} in {where}, got {x!r}"
                )
            if name in counts and not isinstance(x, int):
                raise ValueError(f"machine: expected an int for {name} in {where}, got {x!r}")
        if self.measured is not None:
            self.measured.check(where)


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
        There is none of that name, or its file is no machine's, or cannot be read; the text does
        not begin with the argument's name, which is the command line's.
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

"""Where a function to be checked runs: in a process of its own or, failing that, in this one."""

import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt

from lvxattn.check.call_kernel import backward_of
from lvxattn.check.callers.child_process import ChildProcess, RefusedError
from lvxattn.check.callers.kernel import Kernel
from lvxattn.check.callers.this_process import ThisProcess
from lvxattn.check.case_arrays import Problem
from lvxattn.check.frameworks import Framework
from lvxattn.check.import_target import code_digest, load, target_of
from lvxattn.check.shards import Cut

Array = npt.NDArray[Any]

inside_child = False  # whether this is a process of a function; such a one starts no other


class Process(Protocol):
    """A function in some process."""

    @property
    def own_backward(self) -> bool:
        """Whether it has a backward, so that its gradients are not autograd's."""

    @property
    def abandoned(self) -> int:
        """The number of calls that could not be ended."""

    @property
    def ending(self) -> str:
        """How its process has ended, once closed, if not as it should."""

    def call(
        self, problem: Problem, notes: list[str] | None = None, cut: Cut | None = None
    ) -> dict[str, Array]:
        """Call the function; `Kernel.call` documents results and errors."""

    def look_back(self) -> None:
        """Raise a ContractError if the function has changed its last results."""

    def close(self) -> None:
        """End what the function runs in."""


def process_of(
    fn: Callable[..., Any] | str,
    framework: Framework,
    backward: bool | Callable[..., Any] | str,
    seconds: float,
    ranks: int = 0,
) -> Process:
    """Return a function in a new process; in this one if no other can import the same function.

    Parameters
    ----------
    fn : callable or str
        A text is as `load` takes it.
    framework : Framework
    backward : bool, callable or str
        As `check` takes it.
    seconds : float
        The time limit of a call.
    ranks : int
        Number of virtual ranks; 0 for a function of one process.

    Raises
    ------
    ValueError
        A text names no function; begins with ``fn: `` or ``backward: ``.
    RuntimeError
        A function's process, as it imports the function's module, checks a function.
    """
    if inside_child:
        raise RuntimeError(
            'a checked function\'s module calls check: guard that by if __name__ == "__main__":'
        )
    given = {"fn": fn, "backward": backward}
    if not isinstance(fn, str):  # its attribute may be newer than its module
        given["backward"] = backward_of(fn, backward) or backward
    named = {name: target_of(x) if callable(x) else x for name, x in given.items()}
    if None not in named.values() and hasattr(os, "fork") and sys.executable:
        codes = {name: code_digest(x) for name, x in given.items() if callable(x)}
        try:
            return ChildProcess({**named, "codes": codes, "ranks": ranks}, framework, seconds)
        except RefusedError as error:
            if isinstance(fn, str):
                raise ValueError(str(error)) from None
    here: list[Any] = [load(x, name) if isinstance(x, str) else x for name, x in given.items()]
    return ThisProcess(Kernel(here[0], framework, here[1], seconds, ranks), seconds, ranks)

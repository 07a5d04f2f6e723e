"""Passes, training steps and generation of a model, and the seconds of its parts.

The model in one process does the same, for the check.
"""

import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lvxattn.common.meter import Meter
from lvxattn.torch_impl.commands.model.kinds import Kind, parts
from lvxattn.torch_impl.models import Spread

RATE = 1e-4


@dataclass(frozen=True)
class Cost:
    """Seconds, messages and bytes of a step on one rank.

    Attributes
    ----------
    tower, text, cross : float
        Of the forward: the vision tower (or the encoder), the language model, and its
        cross-attention, with whatever that waits for.
    backward, update : float
        The backward as a whole; averaging gradients, and the optimizer.
    total : float
    waiting : float
        For blocks, in the forward's cross-attention and in the backward.
    messages, bytes : int
        Sent by the attention; the sum of gradients is not counted.
    """

    tower: float
    text: float
    cross: float
    backward: float
    update: float
    total: float
    waiting: float
    messages: int
    bytes: int


class Work:
    """A model and its batch, spread over ranks or alone.

    Parameters
    ----------
    model : Module
    kind : Kind
    batch : dict
        This rank's share.
    device : torch.device
        The model's, to which the batch is copied.
    spread : Spread, optional
    finish : callable
        Waits for the device.
    """

    def __init__(
        self,
        model: Any,
        kind: Kind,
        batch: dict[str, Any],
        device: torch.device,
        spread: Spread | None = None,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.spread, self.finish = model, spread, finish
        self.batch: dict[str, Any] = {
            name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()
        }
        self.optimizer: torch.optim.Optimizer | None = None
        self._seconds: dict[str, float] = {}
        self._began = 0.0
        for name, ends in (("tower", kind.tower), ("cross", kind.cross)):
            for module in parts(model, ends):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(partial(self._end, name))

    def to(self, dtype: torch.dtype) -> None:
        """Change the dtype of parameters and batch; rotary embeddings' frequencies keep theirs."""
        self.model.zero_grad()
        for p in self.model.parameters():
            p.data = p.data.to(dtype)
        self.batch = cast(self.batch, dtype)

    def step(self, *, update: bool) -> tuple[Any, Cost]:
        """Compute a forward and a backward.

        Collective, if spread.

        Parameters
        ----------
        update : bool
            Whether to take a step of AdamW with the gradients.

        Returns
        -------
        outputs
            Of the model, with ``loss`` and ``logits``.
        Cost
        """
        if update and self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.model.zero_grad()
        meter = self._start()
        start = self._now()
        outputs = self.model(**self.batch)
        forward = self._now()
        outputs.loss.backward()
        backward = self._now()
        if self.spread is not None:
            self.spread.average_gradients()
        if update and self.optimizer is not None:
            self.optimizer.step()
        return outputs, self._cost(meter, start, forward, backward, self._now())

    @torch.no_grad()
    def generate(self, count: int) -> tuple[Tensor, Cost]:
        """Generate `count` tokens greedily.

        Collective, if spread.

        Returns
        -------
        tokens : (count,)
        Cost
        """
        prompt = {name: x for name, x in self.batch.items() if name != "labels"}
        length = {"max_new_tokens": count, "min_new_tokens": count}
        meter = self._start()
        start = self._now()
        tokens: Tensor = self.model.generate(**prompt, **length, do_sample=False)
        end = self._now()
        return tokens[0, -count:], self._cost(meter, start, end, end, end)

    def _start(self) -> Meter:
        self._seconds = {"tower": 0.0, "cross": 0.0}
        meter = Meter()
        if self.spread is not None:
            self.spread.meter = meter
        return meter

    def _cost(
        self, meter: Meter, start: float, forward: float, backward: float, end: float
    ) -> Cost:
        tower, cross = self._seconds["tower"], self._seconds["cross"]
        return Cost(
            tower=tower, text=forward - start - tower - cross, cross=cross,
            backward=backward - forward, update=end - backward, total=end - start,
            waiting=meter.waiting, messages=meter.messages, bytes=meter.bytes,
        )  # fmt: skip

    def _now(self) -> float:
        self.finish()
        return perf_counter()

    def _begin(self, *_: Any) -> None:
        self._began = self._now()

    def _end(self, name: str, *_: Any) -> None:
        self._seconds[name] += self._now() - self._began


def forget_peak(device: torch.device) -> None:
    """Count the peak of memory from now on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Return the peak of memory in bytes: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a batch with its real numbers in a dtype."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
    }

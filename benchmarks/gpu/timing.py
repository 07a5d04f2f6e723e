"""Timing on a device by its own clock, and the device's maximum rates.

On a CPU, for rehearsals, by the program's clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

# Seconds per measurement, and the minimum and maximum number of repetitions.
PATIENCE, LEAST, MOST = 0.25, 5, 50


@dataclass(frozen=True)
class Device:
    """The device of the benchmarks.

    Attributes
    ----------
    name : str
        ``"cuda"`` or ``"cpu"``.
    """

    name: str

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal: small shapes, two repetitions."""
        return self.name == "cpu"

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return normal random numbers."""
        return torch.randn(shape, device=self.name, dtype=dtype)

    def sets(self, nbytes: int) -> int:
        """Return the number of sets of inputs of that size that exceeds the cache."""
        if self.tiny:
            return 2
        cache = getattr(torch.cuda.get_device_properties(self.name), "L2_cache_size", 2**26)
        return max(1, -(-4 * cache // max(1, nbytes)))

    def seconds(self, works: Sequence[Callable[[], Any]]) -> float:
        """Return the median duration of calls, which take turns, after uncounted warm-ups.

        Parameters
        ----------
        works : sequence of callable
            The same work on different inputs, so that none is in a cache.
        """
        for work in (works[0], *works[:2]):
            work()
        once = self._timed(works[:1], 1)[0]
        repeat = 2 if self.tiny else max(LEAST, min(MOST, int(PATIENCE / max(once, 1e-9))))
        return median(self._timed(works, repeat))

    def peak(self, work: Callable[[], Any]) -> int:
        """Return the peak of device memory during a call, in bytes beyond those held before.

        0 on a CPU.
        """
        if self.tiny:
            work()
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _timed(self, works: Sequence[Callable[[], Any]], repeat: int) -> list[float]:
        turns = [works[i % len(works)] for i in range(repeat)]
        if self.tiny:
            times = []
            for work in turns:
                start = perf_counter()
                work()
                times.append(perf_counter() - start)
            return times
        marks = []
        for work in turns:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            marks.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in marks]


def ceilings(device: Device) -> list[dict[str, float]]:
    """Return the device's rates in a large product of random bf16 and fp16, and in a copy.

    Returns
    -------
    list of one dict
        ``bfloat16``, ``float16``: operations a second; ``copy``: bytes a second, read and written.
    """
    size, length = (128, 2**16) if device.tiny else (8192, 2**32)
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (device.randn(size, size, dtype=dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = (
            2 * size**3 / device.seconds([lambda a=a, b=b: a @ b, lambda a=a, b=b: b @ a])
        )
    source = torch.ones(length, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    found["copy"] = 2 * length / device.seconds([lambda: target.copy_(source)])
    return [found]

"""How long work takes on a device, by its own clock, and what the device can do at best.

On a CPU, for trying the benchmarks out, it is the program's clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

# Seconds that one measurement may take, within its least and most repetitions.
PATIENCE, LEAST, MOST = 0.25, 5, 50


@dataclass(frozen=True)
class Device:
    """Where the benchmarks run, and how often they measure.

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
        """Return how many sets of inputs of that size a cache cannot hold."""
        if self.tiny:
            return 2
        cache = getattr(torch.cuda.get_device_properties(self.name), "L2_cache_size", 2**26)
        return max(1, -(-4 * cache // max(1, nbytes)))

    def seconds(self, works: Sequence[Callable[[], Any]]) -> float:
        """Return the median seconds of calls, which take turns, after warm-ups that do not count.

        Parameters
        ----------
        works : sequence of callable
            The same work on different inputs, so that none finds its own in a cache.
        """
        for work in (works[0], *works[:2]):
            work()
        once = self._timed(works[:1], 1)[0]
        repeat = 2 if self.tiny else max(LEAST, min(MOST, int(PATIENCE / max(once, 1e-9))))
        return median(self._timed(works, repeat))

    def peak(self, work: Callable[[], Any]) -> int:
        """Return how many bytes beyond those held before lie on the device at most, during a call.

        0 on a CPU, which does not say.
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
    """Return the device's rates: a large product's of random bf16 and fp16, and a copy's.

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

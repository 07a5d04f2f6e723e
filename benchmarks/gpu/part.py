"""Measure one thing on the GPU of this machine.

    python benchmarks/gpu/part.py local [--json FILE] [--cpu]

Parts: ceilings, local, cupy, overhead, million, errors, merging.  What has been measured is written
after every row, so that what runs out of time has something to show.  With --cpu every line is
rehearsed on tiny shapes: such numbers mean nothing.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from store import write
from timing import Device, ceilings


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--cpu", action="store_true", help="rehearse on tiny shapes")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no CUDA device; --cpu rehearses without one")
    if options.json:
        try:
            write(options.json, "[]")
        except OSError as error:
            parser.error(f"--json: expected a file that can be written: {error}")
    torch.manual_seed(0)
    device, found = Device("cpu" if options.cpu else "cuda"), []
    for row in PARTS[options.part](device):
        found.append(row)
        print(json.dumps(row), flush=True)
        if options.json:
            write(options.json, json.dumps(found, indent=1))
    for line in summary(options.part, found):
        print(line)
    print(f"{len(found)} rows measured")


def local(device: Device) -> Iterator[dict[str, Any]]:
    """Measure torch_impl's kernels."""
    from local import measure

    yield from measure(device)


def cupy(device: Device) -> Iterator[dict[str, Any]]:
    """Measure mpi_impl's kernels."""
    from cupy_local import measure

    yield from measure(device)


def overhead(device: Device) -> Iterator[dict[str, Any]]:
    """Measure what the machinery costs a rank that is alone."""
    from machinery import overhead

    yield overhead(device)


def million(device: Device) -> Iterator[dict[str, Any]]:
    """Measure memory at a million keys."""
    from machinery import million

    yield million(device)


def errors(device: Device) -> Iterator[dict[str, Any]]:
    """Measure errors over shards."""
    from errors import measure

    yield from measure(device)


def merging(device: Device) -> Iterator[dict[str, Any]]:
    """Measure the merge."""
    from merging import measure

    yield from measure(device)


def summary(part: str, found: list[dict[str, Any]]) -> list[str]:
    """Return lines for a reader, where a part has any."""
    if part != "local":
        return []
    from local import rules

    return ["what was fastest, for torch_impl/kernels/choose.py:", *rules(found)]


PARTS: dict[str, Callable[[Device], Iterator[dict[str, Any]]]] = {
    "ceilings": lambda device: iter([ceilings(device)]),
    "local": local,
    "cupy": cupy,
    "overhead": overhead,
    "million": million,
    "errors": errors,
    "merging": merging,
}

if __name__ == "__main__":
    main()

"""Measure one thing on the GPU of this machine.

    python benchmarks/gpu/part.py local [--json FILE] [--cpu]

Parts: ceilings, local, cupy, overhead, million, errors, merging.  Results are written after every
row, so that a part that runs out of time leaves some.  --cpu rehearses every line on tiny shapes:
such numbers mean nothing.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path

import torch
from store import write
from timing import Device

# The module and the function of each; imported on their own, as not all are for all machines.
PARTS = {
    "ceilings": ("timing", "ceilings"),
    "local": ("local", "measure"),
    "cupy": ("cupy_local", "measure"),
    "overhead": ("machinery", "overhead"),
    "million": ("machinery", "million"),
    "errors": ("errors", "measure"),
    "merging": ("merging", "measure"),
}


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
    name, function = PARTS[options.part]
    module = import_module(name)
    for row in getattr(module, function)(device):
        found.append(row)
        print(json.dumps(row), flush=True)
        if options.json:
            write(options.json, json.dumps(found, indent=1))
    if options.part == "local":
        print("what was fastest, for torch_impl/kernels/choose.py:", *module.rules(found), sep="\n")
    print(f"{len(found)} rows measured")


if __name__ == "__main__":
    main()

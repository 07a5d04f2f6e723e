"""Registers, shared memory and spills of mpi_impl's CUDA kernels, as compiled.

    python benchmarks/cuda_kernel.py [--out FILE]

writes benchmarks/results/cuda-kernel.md.  It needs nvcc but no GPU: nothing is run or timed.
"""

import argparse
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from lvxattn.common.new_file import write_file
from lvxattn.mpi_impl.kernels.build import HEAD_DIMS, KERNELS, SCALARS, options, source, tiles_of

RESULTS = Path(__file__).with_name("results") / "cuda-kernel.md"
ARCHITECTURES = (80, 90)


def compile_with_nvcc(dtype: str, D: int, *architectures: int) -> dict[str, tuple[int, int]]:
    """Return, for each kernel and architecture, its registers and the bytes that it spills.

    Keys are ``"kernel sm_NN"``.  A warning is an error.
    """
    found: dict[str, tuple[int, int]] = {}
    with TemporaryDirectory() as folder:
        (Path(folder) / "attention.cu").write_text(source())
        for architecture in architectures:
            done = subprocess.run(
                [
                    "nvcc", "-Werror", "all-warnings", "-Xptxas", "-v", *options(dtype, D),
                    "-ftz=true",  # CuPy adds it
                    f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
                    "-cubin", "-o", "attention.cubin", "attention.cu",
                ],
                cwd=folder, capture_output=True, text=True,
            )  # fmt: skip
            said = done.stdout + done.stderr
            if done.returncode:
                raise RuntimeError(f"nvcc for {dtype}, D = {D}, sm_{architecture}: {said}")
            for block in said.split("Compiling entry function")[1:]:
                name, registers, stores = (
                    re.search(pattern, block)[1]  # type: ignore[index]
                    for pattern in (r"'(\w+)'", r"Used (\d+) registers", r"(\d+) bytes spill st")
                )
                found[f"{name} sm_{architecture}"] = int(registers), int(stores)
    return found


def table() -> str:
    """Return the report."""
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V[\d.]+", nvcc)
    lines = [
        "# The CUDA kernels as compiled",
        "",
        f"By nvcc {release[0] if release else '?'}; written by `benchmarks/cuda_kernel.py`. "
        "Nothing here was run or timed on a GPU.",
        "",
        "| dtype | D | kernel | warps | rows | columns | shared memory, bytes | "
        + " | ".join(f"registers, sm_{a} | spilled bytes, sm_{a}" for a in ARCHITECTURES)
        + " |",
        "|---" * (7 + 2 * len(ARCHITECTURES)) + "|",
    ]
    for dtype in SCALARS:
        for D in HEAD_DIMS:
            found, tiles = compile_with_nvcc(dtype, D, *ARCHITECTURES), tiles_of(dtype, D)
            for name in KERNELS:
                row = [dtype, D, f"`{name}`", "", "", "", 0]
                if name in tiles:
                    tile = tiles[name]
                    shared = tile.shared_bytes(dtype, D)
                    row[3:] = [tile.warps, tile.rows, tile.cols, f"{shared:,}"]
                row += [x for a in ARCHITECTURES for x in found[f"{name} sm_{a}"]]
                lines.append(f"| {' | '.join(str(x) for x in row)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", type=Path, default=RESULTS)
    out = parser.parse_args().out
    if not shutil.which("nvcc"):
        parser.error("nvcc, of a CUDA toolkit, is not on PATH")
    if not out.parent.is_dir():
        parser.error(f"--out: there is no folder {out.parent}")
    write_file(out, table())
    print(out)


if __name__ == "__main__":
    main()

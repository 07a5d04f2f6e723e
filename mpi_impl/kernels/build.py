"""The source of the kernels, the sizes of their tiles, and the compiler's options.

One build is for one dtype and one D.  All parameters to be tuned for another device are in `TILES`;
`Tile` computes blocks of threads and shared memory from them.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("ptx.cuh", "tile.cuh", "attention.cu")
SCALARS = {"float16": "half16", "bfloat16": "bfloat16", "float32": "float"}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
HEAD_DIMS = (64, 128)
# Rows, one per warp, in a block of threads of the kernels that join splits.
JOIN_WARPS = 8
KERNELS = ("forward", "merge_splits", "backward_q", "sum_splits", "backward_kv")


@dataclass(frozen=True)
class Tile:
    """The tile of one kernel.

    Attributes
    ----------
    warps : int
        Warps of a block of threads.
    row_tiles : int
        Rows of each warp, in units of 16; their sums are in its registers.
    cols : int
        Columns of a step; a multiple of 16.
    kept : int
        Number of arrays whose rows stay in shared memory; the columns of two arrays pass through.
    """

    warps: int
    row_tiles: int
    cols: int
    kept: int

    @property
    def rows(self) -> int:
        """Return the rows of a block."""
        return 16 * self.row_tiles * self.warps

    def shared_bytes(self, dtype: str, D: int) -> int:
        """Return the shared memory of a block: rows once, columns twice, padded by 16 bytes.

        Two fp32 numbers for each column, twice, are `backward_kv`'s lse and delta.
        """
        pitch = D * ITEMSIZE[dtype] + 16
        return (self.kept * self.rows + 2 * 2 * self.cols) * pitch + 2 * 2 * self.cols * 4


# By itemsize and D: the largest for which the compiler, for sm_80 and sm_90, spills no registers.
# None has been timed.
TILES: dict[tuple[int, int], dict[str, Tile]] = {
    (2, 64): {
        "forward": Tile(warps=4, row_tiles=2, cols=64, kept=1),
        "backward_q": Tile(warps=8, row_tiles=1, cols=64, kept=2),
        "backward_kv": Tile(warps=8, row_tiles=1, cols=64, kept=2),
    },
    (2, 128): {
        "forward": Tile(warps=4, row_tiles=2, cols=32, kept=1),
        "backward_q": Tile(warps=8, row_tiles=1, cols=32, kept=2),
        "backward_kv": Tile(warps=8, row_tiles=1, cols=32, kept=2),
    },
    (4, 64): {
        "forward": Tile(warps=4, row_tiles=1, cols=32, kept=1),
        "backward_q": Tile(warps=4, row_tiles=1, cols=16, kept=2),
        "backward_kv": Tile(warps=4, row_tiles=1, cols=32, kept=2),
    },
    (4, 128): {
        "forward": Tile(warps=4, row_tiles=1, cols=32, kept=1),
        "backward_q": Tile(warps=4, row_tiles=1, cols=32, kept=2),
        "backward_kv": Tile(warps=4, row_tiles=1, cols=32, kept=2),
    },
}


def tiles_of(dtype: str, D: int) -> dict[str, Tile]:
    """Return the tiles of the three kernels, by name."""
    return TILES[ITEMSIZE[dtype], D]


def source(*files: str) -> str:
    """Return the source as one text, as the compiler's cache ignores included files."""
    parts = ((name, (FOLDER / name).read_text()) for name in files or SOURCES)
    return "\n".join(f'#line 1 "{name}"\n{text}' for name, text in parts)


def options(dtype: str, D: int) -> tuple[str, ...]:
    """Return the compiler's options: the language, and the macros of the source."""
    defined = {"SCALAR": SCALARS[dtype], "HEAD_DIM": D, "JOIN_WARPS": JOIN_WARPS}
    for name, tile in tiles_of(dtype, D).items():
        sizes = {"WARPS": tile.warps, "ROW_TILES": tile.row_tiles, "COLS": tile.cols}
        defined |= {f"{name.upper()}_{what}": size for what, size in sizes.items()}
    return ("--std=c++17", *(f"-D{what}={value}" for what, value in defined.items()))

"""The source of the kernels, their tiles, and what the compiler is told of both.

One build serves one dtype and one D.  Everything that is worth tuning on another device is in
`TILES`; how blocks and shared memory follow from it is in `Tile`.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("ptx.cuh", "tile.cuh", "attention.cu")
SCALARS = {"float16": "half16", "bfloat16": "bfloat16", "float32": "float"}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
HEAD_DIMS = (64, 128)
# Rows that a block of the kernels that join splits takes, a warp each.
JOIN_WARPS = 8
KERNELS = ("forward", "merge_splits", "backward_q", "sum_splits", "backward_kv")


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut.

    Attributes
    ----------
    warps : int
        Of a block of threads.
    row_tiles : int
        Times 16 are the rows of each warp, whose sums its registers hold.
    cols : int
        Of a step; a multiple of 16.
    kept : int
        How many arrays' rows stay in shared memory; two arrays' columns pass by.
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


# By the size of a number in bytes and D: the largest for which the compiler, for sm_80 and sm_90,
# keeps everything in registers.  None has been timed.
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
    """Return the source in one piece: a compiler's cache does not see what a source includes."""
    parts = ((name, (FOLDER / name).read_text()) for name in files or SOURCES)
    return "\n".join(f'#line 1 "{name}"\n{text}' for name, text in parts)


def options(dtype: str, D: int) -> tuple[str, ...]:
    """Return the compiler's options: the language, and what the source expects to be defined."""
    defined = {"SCALAR": SCALARS[dtype], "HEAD_DIM": D, "JOIN_WARPS": JOIN_WARPS}
    for name, tile in tiles_of(dtype, D).items():
        sizes = {"WARPS": tile.warps, "ROW_TILES": tile.row_tiles, "COLS": tile.cols}
        defined |= {f"{name.upper()}_{what}": size for what, size in sizes.items()}
    return ("--std=c++17", *(f"-D{what}={value}" for what, value in defined.items()))

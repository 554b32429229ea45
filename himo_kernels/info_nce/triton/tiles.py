"""The tile of every kernel, by architecture and dtype: a table, so that no first call is tuned.

`python -m himo_kernels.info_nce.triton.tune` times others on the GPU at hand and prints rows for
this table. None is measured yet; the reasons below are arithmetic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from himo_kernels import _triton

# Of every launch: multiply-adds are one instruction. Stated, for Triton's default is to change.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """Rows x columns of logits that a program forms at a time, and the depth of one load.

    rows divides columns: the diagonal of a block of rows then lies in one tile.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int | bool]:
        """Returns the keywords of a launch."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_INNER": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **FUSED,
        }


# Large tiles in 16 bits: 128 x 128 asks 1 byte of shared memory for 64 FLOPs. Its 220 to 255
# registers a thread leave room for one program on a multiprocessor (`make aot`), so that nothing
# multiplies while it takes exponentials: 64 x 128 or 4 warps, which leave more, are to be timed.
# float32 proper multiplies on the scalar units, which 64 x 64 keeps busy. Its depths and stages,
# and its small tile on sm_80, are those at which neither Triton 3.6 nor 3.9 spills.
_LARGE = {
    (90, 16): Tile(128, 128, 64, num_warps=8, num_stages=3),
    (80, 16): Tile(128, 128, 32, num_warps=8, num_stages=3),
    (90, 32): Tile(64, 64, 16, num_warps=8, num_stages=4),
    (80, 32): Tile(64, 64, 16, num_warps=8, num_stages=3),
}
# Where there are few tiles: a chip of 132 multiprocessors wants many.
_SMALL = {
    (90, 16): Tile(64, 64, 64, num_warps=4, num_stages=3),
    (80, 16): Tile(64, 64, 64, num_warps=4, num_stages=3),
    (90, 32): Tile(32, 32, 16, num_warps=4, num_stages=3),
    (80, 32): Tile(16, 32, 16, num_warps=4, num_stages=3),
}
# Where X is a sum of terms of 16 bits, a step loads all of them beside Y: half as deep, it needs no
# more shared memory. sm_80 addresses each load in registers, which fewer rows leave free.
_LARGE_OF_TERMS = {
    90: Tile(128, 128, 32, num_warps=8, num_stages=3),
    80: Tile(64, 128, 32, num_warps=8, num_stages=3),
}
_SMALL_OF_TERMS = Tile(64, 64, 32, num_warps=4, num_stages=3)
# Small enough that a test of 40 rows has several; rows and columns differ on purpose.
_INTERPRETER = Tile(16, 32, 32, num_warps=4, num_stages=1)

FEW_TILES = 256  # about two waves of 132 multiprocessors

forced: Tile | None = None  # what tune.py tries in place of the table


def tile_for(features: Tensor, problems: int, rows: int, columns: int, terms: int = 1) -> Tile:
    """Returns the tile for this many problems of M x N logits, X being a sum of terms."""
    capability = _triton.capability(features)
    if forced is not None:
        return forced
    if capability == 0:
        return _INTERPRETER
    architecture = 90 if capability >= 90 else 80  # the newest that is not newer than the device
    key = (architecture, 8 * features.element_size())
    large, small = _LARGE[key], _SMALL[key]
    if terms > 1:
        large, small = _LARGE_OF_TERMS[architecture], _SMALL_OF_TERMS
    tiles = problems * -(-rows // large.rows) * -(-columns // large.columns)
    return large if tiles >= FEW_TILES else small


def precision_for(dtype: torch.dtype) -> str:
    """Returns tl.dot's input_precision: float32 proper; 16-bit products are exact in float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def product_tile_for(x: Tensor) -> Tile:
    """Returns the tile of a product that the rank bounds: small, for few columns fill few tiles."""
    if _triton.capability(x) == 0:
        return _INTERPRETER
    return Tile(64, 64, 32, num_warps=4, num_stages=3 if x.element_size() == 2 else 2)

"""Tile sizes by architecture and dtype: a fixed table, so that no call is spent on autotuning.

`python -m himo_kernels.info_nce.triton.tune` times other tiles on the available GPU and prints rows
for this table. No entry has been measured yet; the reasons below are arithmetic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from himo_kernels import _triton

# For every launch: fuse multiply-adds. Set explicitly because Triton's default is going to change.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """Rows x columns of logits per program and step, and the depth `inner` of one load.

    rows must divide columns, so that the diagonal of a row block lies in one tile.
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


# Large tiles, 16 bits: 128 x 128 does 64 FLOPs per byte of shared memory. It needs 220 to 255
# registers per thread (`make aot`), so only one program fits on a multiprocessor and no matmul
# overlaps its exponentials; 64 x 128, or 4 warps, would allow more and should be timed.
# float32 without TF32 does not use the tensor cores; 64 x 64 keeps the FP32 cores busy. Its depths
# and stages, and its small tile on sm_80, were chosen so that Triton 3.6 and 3.9 do not spill.
_LARGE = {
    (90, 16): Tile(128, 128, 64, num_warps=8, num_stages=3),
    (80, 16): Tile(128, 128, 32, num_warps=8, num_stages=3),
    (90, 32): Tile(64, 64, 16, num_warps=8, num_stages=4),
    (80, 32): Tile(64, 64, 16, num_warps=8, num_stages=3),
}
# For small problems: smaller tiles give more programs for the 132 multiprocessors.
_SMALL = {
    (90, 16): Tile(64, 64, 64, num_warps=4, num_stages=3),
    (80, 16): Tile(64, 64, 64, num_warps=4, num_stages=3),
    (90, 32): Tile(32, 32, 16, num_warps=4, num_stages=3),
    (80, 32): Tile(16, 32, 16, num_warps=4, num_stages=3),
}
# If X is a sum of 16-bit terms, a step loads all of them and Y. Half the depth keeps the shared
# memory the same. sm_80 holds the addresses of all loads in registers, so it uses fewer rows.
_LARGE_OF_TERMS = {
    90: Tile(128, 128, 32, num_warps=8, num_stages=3),
    80: Tile(64, 128, 32, num_warps=8, num_stages=3),
}
_SMALL_OF_TERMS = Tile(64, 64, 32, num_warps=4, num_stages=3)
# So small that a test with 40 rows has several tiles. Rows and columns differ on purpose.
_INTERPRETER = Tile(16, 32, 32, num_warps=4, num_stages=1)

FEW_TILES = 256  # about two waves of 132 multiprocessors

forced: Tile | None = None  # overrides the table; set by tune.py


def tile_for(
    features: Tensor,
    problems: int,
    rows: int,
    columns: int,
    terms: int = 1,
    *,
    small_only: bool = False,
) -> Tile:
    """Returns the tile for this many problems of M x N logits, with X a sum of `terms` terms."""
    capability = _triton.capability(features)
    if forced is not None:
        return forced
    if capability == 0:
        return _INTERPRETER
    architecture = 90 if capability >= 90 else 80  # the newest entry that the device supports
    key = (architecture, 8 * features.element_size())
    large, small = _LARGE[key], _SMALL[key]
    if terms > 1:
        large, small = _LARGE_OF_TERMS[architecture], _SMALL_OF_TERMS
    tiles = problems * -(-rows // large.rows) * -(-columns // large.columns)
    return large if tiles >= FEW_TILES and not small_only else small


def precision_for(dtype: torch.dtype) -> str:
    """Returns tl.dot's input_precision: no TF32 for float32; irrelevant for 16-bit inputs."""
    return "ieee" if dtype == torch.float32 else "tf32"


def product_tile_for(x: Tensor) -> Tile:
    """Returns the tile of a rank-bounded product: small, since its few columns fill few tiles."""
    if _triton.capability(x) == 0:
        return _INTERPRETER
    return Tile(64, 64, 32, num_warps=4, num_stages=3 if x.element_size() == 2 else 2)

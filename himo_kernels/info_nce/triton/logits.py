"""The operands of one loss, S = s X Y^T, and the product of one tile.

X [TERMS, B, M, W] is a sum of terms: one term for features, several for a low-rank product that
needs more than 16 bits. X and Y are contiguous and W is a multiple of 16, so that loads are whole
vectors. `rank` bounds the inner dimension on the device; X and Y are zero past it. Row i and column
i + pair_offset are a pair, if there is such a column; for a whole batch M = N and the offset is 0.
Offsets of problems and blocks are int64, offsets inside a block int32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels._triton_jit import dot
from himo_kernels.info_nce.triton.tiles import Tile, precision_for, tile_for


@dataclass(frozen=True)
class Branch:
    """One loss, or a block of its logits: S = s X Y^T, with X a sum of terms."""

    left: Tensor  # [TERMS, B, M, W]
    right: Tensor  # [B, N, W]
    scale: Tensor  # []
    rank: Tensor | None = None  # [B] int64, in [0, W]: X and Y are zero from this column on
    pair_offset: int = 0  # row i and column i + pair_offset are a pair, if there is such a column
    small_tiles: bool = False  # for kernels that need more registers per logit

    @property
    def problems(self) -> int:
        return self.right.shape[0]

    @property
    def rows(self) -> int:
        return self.left.shape[2]

    @property
    def columns(self) -> int:
        return self.right.shape[1]

    @property
    def tile(self) -> Tile:
        sizes = (self.problems, self.rows, self.columns, self.left.shape[0])
        return tile_for(self.right, *sizes, small_only=self.small_tiles)

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.rows, self.tile.rows)

    @property
    def column_tiles(self) -> int:
        return triton.cdiv(self.columns, self.tile.columns)

    def sizes(self) -> tuple[int, int, int, int, int]:
        """Returns M, N, the pair offset, W and the stride between terms."""
        width = self.right.shape[-1]
        return self.rows, self.columns, self.pair_offset, width, self.left.stride(0)

    def new_empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns an uninitialised tensor on the device of the branch."""
        return torch.empty(shape, dtype=dtype, device=self.right.device)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.left, self.right, self.rank, self.scale

    def constants(self) -> dict[str, object]:
        return {
            "TERMS": self.left.shape[0],
            "PRECISION": precision_for(self.right.dtype),
            **self.tile.constants(),
        }


def features_branch(image: Tensor, text: Tensor, scale: Tensor, pair_offset: int = 0) -> Branch:
    """Returns the branch of image against text, [*, N, D] each, or of a block [M, D], [N, D]."""
    return Branch(padded(image).unsqueeze(0), padded(text), scale, pair_offset=pair_offset)


def padded(x: Tensor, rows: bool = False) -> Tensor:
    """Returns [*, N, D] as contiguous [B, N, W], with W (and N if rows) padded to multiples of 16.

    Rows are then aligned for whole vector loads. Copies only if x is not already in this layout.
    """
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
    columns_missing, rows_missing = -x.shape[-1] % 16, -x.shape[-2] % 16 if rows else 0
    if columns_missing or rows_missing:
        x = F.pad(x, (0, columns_missing, 0, rows_missing))
    return x.contiguous()


@triton.jit
def tile_products(
    left_ptr,  # [TERMS, M, W] of one problem
    right_ptr,  # [N, W] of one problem
    first_row,
    first_column,
    row_count,  # M
    column_count,  # N
    width,
    inner,  # the first `inner` columns of W are multiplied
    term_stride,
    TERMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X Y^T [BLOCK_ROWS, BLOCK_COLUMNS] in float32; zeros past M and N."""
    rows = tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    depth = tl.arange(0, BLOCK_INNER)
    left_ptr += first_row.to(tl.int64) * width
    right_ptr += first_column.to(tl.int64) * width
    left = left_ptr + rows[:, None] * width + depth[None, :]
    right = right_ptr + columns[None, :] * width + depth[:, None]
    row_mask = (first_row + rows < row_count)[:, None]
    column_mask = (first_column + columns < column_count)[None, :]
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        in_bounds = start + depth < inner
        y = tl.load(right + start, mask=in_bounds[:, None] & column_mask, other=0.0)
        for term in tl.static_range(TERMS):
            x_ptr = left + term * tl.cast(term_stride, tl.int64) + start
            x = tl.load(x_ptr, mask=in_bounds[None, :] & row_mask, other=0.0)
            accumulator = dot(x, y, accumulator, PRECISION)
    return accumulator


@triton.jit
def up_to_rank(rank_ptr, problem, width):
    """Returns the rank rounded up to a multiple of 16, or the width if there is no rank.

    Masks then cover whole vectors, so loads stay vectorised; columns past the rank are zero.
    """
    if rank_ptr is None:
        inner = width
    else:
        inner = (tl.cdiv(tl.load(rank_ptr + problem), 16) * 16).to(tl.int32)
    return inner

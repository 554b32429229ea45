"""One loss as the kernels take it, S = s X Y^T, and the product of a tile of it.

X [TERMS, B, M, W] is the sum of its terms: one for features, more for a product that 16 bits cannot
hold. X and Y are contiguous and W is a multiple of 16, so that loads are whole vectors. `rank`
bounds the inner dimension on the device, and both are zero past it. Row i and column
i + pair_offset are a pair, where there is such a column: of a whole batch M = N and the offset is
0. Offsets of problems and of blocks are int64, inside a block int32.
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
    """One loss, or a block of its logits: S = s X Y^T, with X the sum of its terms."""

    left: Tensor  # [TERMS, B, M, W]
    right: Tensor  # [B, N, W]
    scale: Tensor  # []
    rank: Tensor | None = None  # [B] int64, at least 0 and at most W: what is not zero of W
    pair_offset: int = 0  # row i and column i + pair_offset are a pair, where there is one

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
        return tile_for(self.right, self.problems, self.rows, self.columns, self.left.shape[0])

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.rows, self.tile.rows)

    @property
    def column_tiles(self) -> int:
        return triton.cdiv(self.columns, self.tile.columns)

    def sizes(self) -> tuple[int, int, int, int, int]:
        """Returns M, N, the offset of the pairs, W and the stride of a term."""
        width = self.right.shape[-1]
        return self.rows, self.columns, self.pair_offset, width, self.left.stride(0)

    def new_empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns uninitialised memory on the branch's device."""
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
    """Returns the loss of image [*, N, D] against text [*, N, D], or a block of other shapes."""
    return Branch(padded(image).unsqueeze(0), padded(text), scale, pair_offset=pair_offset)


def padded(x: Tensor, rows: bool = False) -> Tensor:
    """Returns [*, N, D] as [B, N, W], contiguous, W the next multiple of 16; N too if rows.

    Rows then begin where a load of whole vectors can. A copy only where x is not so already.
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
    inner,  # columns of W that count
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
        kept = start + depth < inner
        y = tl.load(right + start, mask=kept[:, None] & column_mask, other=0.0)
        for term in tl.static_range(TERMS):
            x_ptr = left + term * tl.cast(term_stride, tl.int64) + start
            x = tl.load(x_ptr, mask=kept[None, :] & row_mask, other=0.0)
            accumulator = dot(x, y, accumulator, PRECISION)
    return accumulator


@triton.jit
def up_to_rank(rank_ptr, problem, width):
    """rank rounded up to whole vectors of 16, or the width where there is none.

    What lies between is zero, and masks of whole vectors keep loads whole.
    """
    if rank_ptr is None:
        inner = width
    else:
        inner = (tl.cdiv(tl.load(rank_ptr + problem), 16) * 16).to(tl.int32)
    return inner

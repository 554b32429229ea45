"""One loss as the kernels take it: S = s X Y^T, from features or from low-rank factors."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from himo_kernels.info_nce.compose import Factors
from himo_kernels.info_nce.triton.products import bounded_product
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


# What the sum of X's terms holds of a float32 number: 24 bits, 22 bits, all.
_TERMS = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}


@dataclass(frozen=True)
class KeptFactors:
    """V, C and B of component_features = C B, all with zeros past the rank."""

    image: Tensor  # [B, N, W of D]
    coefficients: Tensor  # [B, N, W]
    basis: Tensor  # [B, W, W of D]
    rank: Tensor  # [B] int64, at least 0 and at most W


def kept_factors(
    image: Tensor,  # [*, N, D]
    factors: Factors,
) -> KeptFactors:
    """Returns the factors with what is past the rank set to zero: nobody need have filled it."""
    coefficients, basis = padded(factors.coefficients), padded(factors.basis, rows=True)
    rank = factors.rank.reshape(-1).clamp(0, coefficients.shape[-1])
    kept = torch.arange(coefficients.shape[-1], device=rank.device) < rank[:, None]  # [B, W]
    return KeptFactors(
        padded(image),
        torch.where(kept[:, None, :], coefficients, 0.0),
        torch.where(kept[:, :, None], basis, 0.0),
        rank,
    )


def factors_branch(factors: KeptFactors, scale: Tensor) -> Branch:
    """Returns the loss of images against coefficients @ basis, inside the K columns of a factor.

    V (C B)^T = (V B^T) C^T, whose inner dimension is the rank. V B^T in 16 bits would cost the
    logits their digits, so it is kept in terms of 16 bits. In float16 it must stay below 65504.
    """
    dtype, shape = factors.image.dtype, factors.coefficients.shape
    left = torch.empty((_TERMS[dtype], *shape), dtype=dtype, device=factors.image.device)
    bounded_product(factors.image, factors.basis.mT, factors.rank, "columns", left)
    return Branch(left, factors.coefficients, scale, factors.rank)


def padded(x: Tensor, rows: bool = False) -> Tensor:
    """Returns [*, N, D] as [B, N, W], contiguous, W the next multiple of 16; N too if rows.

    Rows then begin where a load of whole vectors can. A copy only where x is not so already.
    """
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
    columns_missing, rows_missing = -x.shape[-1] % 16, -x.shape[-2] % 16 if rows else 0
    if columns_missing or rows_missing:
        x = F.pad(x, (0, columns_missing, 0, rows_missing))
    return x.contiguous()

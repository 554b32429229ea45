"""The weights of eigenvector pairs in the gradient of the projector, applied in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels import _triton
from himo_kernels._triton_jit import float64_of

BLOCK = 32  # side of a tile


def weigh_pairs(
    products: Tensor,  # [P, n, n] float64, in place
    eigenvalues: Tensor,  # [P, n] float64
    rank: Tensor,  # [P]
    gap_eps: float,
    *,
    null: bool = False,
    symmetric: bool = False,
) -> None:
    """Multiplies entry (i, j) of a kept row i by F_ij if j is dropped and by 0 if j is kept.

    Rows past rank are unchanged. null=True uses the weight of eq. (9),
    lambda_R (F_ij - F_i0) / lambda_j, without a division by lambda_j. symmetric=True replaces M by
    H + H^T, where H is the weighted M + M^T of eq. (5).
    """
    problems, size = eigenvalues.shape
    tiles = triton.cdiv(size, BLOCK)
    if problems:
        _weigh_pairs_kernel[(problems * tiles * tiles,)](
            products,
            eigenvalues,
            rank,
            _triton.float64_bits(gap_eps),
            size,
            NULL=null,
            SYMMETRIC=symmetric,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def null_weights(
    eigenvalues: Tensor,  # [P, n]
    rank: Tensor,  # [P]
    present: Tensor,  # [P, n] bool
    gap_eps: float,
) -> Tensor:
    """Returns F_i0 [P, n], the pair weight of kept i with a direction of variance 0."""
    last_kept = eigenvalues.gather(-1, rank.unsqueeze(-1) - 1)
    last_kept = torch.where(last_kept == 0, 1.0, last_kept)
    relative = eigenvalues / last_kept
    denominator = torch.where(present, relative + gap_eps**2 / relative, torch.inf)
    return 1 / denominator / last_kept


@triton.jit
def _weigh_pairs_kernel(
    products_ptr,  # [P, n, n]
    eigenvalues_ptr,  # [P, n]
    rank_ptr,  # [P]
    gap_eps_bits,
    n,
    NULL: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK)
    tile = tl.program_id(0) % (tiles * tiles)
    problem = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    i = (tile // tiles) * BLOCK + tl.arange(0, BLOCK)
    j = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(rank_ptr + problem)
    if not SYMMETRIC:
        if (tile // tiles) * BLOCK >= rank:
            return
    values = eigenvalues_ptr + problem * n
    # Divide by lambda_R, since squares of eigenvalues may overflow. If it is 0, nothing is dropped.
    last_kept = tl.load(values + rank - 1)
    last_kept = tl.where(last_kept == 0, 1.0, last_kept)
    kept = tl.load(values + i, mask=i < rank, other=0.0)[:, None]
    dropped = tl.load(values + j, mask=j < n, other=0.0)[None, :]
    pairs = (i < rank)[:, None] & ((j >= rank) & (j < n))[None, :]
    gap = (kept - dropped) / last_kept  # subtract first: the difference of close values is exact
    weighs = pairs & (gap != 0)  # the weight tends to 0 at a gap of 0
    gap_eps = float64_of(gap_eps_bits)
    square = gap_eps * gap_eps
    if NULL:
        relative = kept / last_kept
        noise = tl.load(values) * (n * 2.0**-52)
        weighs = weighs & ((kept <= noise) == 0)
        numerator = gap * relative - square
        denominator = (gap * gap + square) * (relative * relative + square)
    else:
        numerator = 1.0
        denominator = gap + square / tl.where(weighs, gap, 1.0)
    weight = numerator / tl.where(weighs, denominator, 1.0) / last_kept
    products_ptr += problem * n * n
    ptrs = products_ptr + i[:, None] * n + j[None, :]
    product = tl.load(ptrs, mask=pairs, other=0.0)
    written = (i < rank)[:, None] & (j < n)[None, :]
    if SYMMETRIC:
        # The program of tile (kept, dropped) reads and writes both entries of a pair.
        mirrored_ptrs = products_ptr + j[None, :] * n + i[:, None]
        product += tl.load(mirrored_ptrs, mask=pairs, other=0.0)
        tl.store(mirrored_ptrs, tl.where(weighs, product * weight, 0.0), mask=pairs)
        written |= ((i >= rank) & (i < n))[:, None] & ((j >= rank) & (j < n))[None, :]
    tl.store(ptrs, tl.where(weighs, product * weight, 0.0), mask=written)

"""Pass 2: the logits again, dS of them in a bounded workspace, and the products with it.

Nothing here reads a value on the host: shapes alone decide, so a CUDA graph can hold all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from himo_kernels.info_nce.compose import Settings, Statistics
from himo_kernels.info_nce.triton import epilogues, kernels
from himo_kernels.info_nce.triton.branch import Branch
from himo_kernels.info_nce.triton.products import bounded_product
from himo_kernels.info_nce.triton.tiles import FUSED

# dS of as many rows as fit. Large enough that the products with it are of some thousand rows at
# N = 32768, where they run at the rate of large ones.
WORKSPACE_BYTES = 256 * 2**20
# Samples from which dS of 16-bit features has 16 bits, for the tensor cores. Below, its products
# cost nothing beside the launches, and the gradients are rounded once, to the features' dtype.
ROUNDED_FROM = 128

_GRADIENT = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128, "num_warps": 4, **FUSED}
_SCALE = {"BLOCK": 4096, "num_warps": 8, **FUSED}


@dataclass(frozen=True)
class Needs:
    """Which gradients pass 2 makes."""

    left: bool = False  # of X
    left_keys: bool = False  # of X where X is the key: of the columns alone if keys are constants
    right: bool = False  # of Y
    scale: bool = False


@dataclass(frozen=True)
class Gradients:
    """What was asked for; None where it was not."""

    left: Tensor | None = None  # [B, M, W], float32 unless another dtype was asked for
    left_keys: Tensor | None = None  # [B, M, W] float32
    right: Tensor | None = None  # [B, N, W], in the dtype of Y unless another was asked for
    scale: Tensor | None = None  # [] float32


@dataclass(frozen=True)
class Direction:
    """The softmax of the rows, or of the columns; all float32 and contiguous."""

    positives: Tensor  # [B, n]: S of the pair of each
    nll: Tensor  # [B, n]
    weight: Tensor | None = None  # [B, n]: gradient of each nll; None: 1

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.positives, self.nll, self.weight


def gradients(
    branch: Branch,
    statistics: Statistics,
    settings: Settings,
    needs: Needs,
    *,
    add_to: Gradients = Gradients(),
    left_dtype: torch.dtype = torch.float32,
) -> Gradients:
    """Returns the gradients of X, Y and s of a whole batch: eq. (6) and (7).

    Those of X and s include what another loss has left in add_to, in float32.
    """
    if needs == Needs():
        return Gradients()
    shape, samples = branch.right.shape, branch.columns
    positives = _positives(branch)
    rows, columns = (
        Direction(positives, nll.reshape(-1, samples).contiguous())
        for nll in (statistics.row_nll, statistics.column_nll)
    )
    scale_partials = None
    if needs.scale:
        scale_partials = branch.new_empty(branch.problems, branch.row_blocks, branch.column_tiles)
    pass_2 = _Pass2(
        branch,
        rows,
        columns,
        settings,
        total=samples,
        unit=statistics.grad_loss.reshape(-1).float().contiguous(),
        divisor=2 * samples,
        scale=branch.scale,
        scale_partials=scale_partials,
    )
    one_left = (
        needs.left_keys and settings.differentiate_keys
    )  # left and left_keys are one gradient
    left = left_keys = right = None
    if needs.left or one_left:
        in_place = add_to.left is not None and left_dtype == torch.float32
        left = add_to.left if in_place else branch.new_empty(*shape, dtype=left_dtype)
    if needs.left_keys and not one_left:
        left_keys = branch.new_empty(*shape)
    if needs.right:
        right = branch.new_empty(*shape, dtype=branch.right.dtype)
    pass_2.write(left, left_keys, right, add_to.left)
    scale = None
    if scale_partials is not None:
        scale = _scale_gradient(scale_partials, pass_2.unit, pass_2.divisor, add_to.scale)
    return Gradients(left if needs.left else None, left if one_left else left_keys, right, scale)


def block_gradients(
    branch: Branch,  # of one problem
    rows: Direction,
    columns: Direction,
    unit: Tensor,  # [1]: what the weights of both are in units of
    settings: Settings,
    total: int,  # samples of the batch
) -> tuple[Tensor, Tensor]:
    """Returns the gradients [1, M, W] of X and [1, N, W] of Y, float32, without the factor s."""
    pass_2 = _Pass2(branch, rows, columns, settings, total=total, unit=unit)
    left, right = branch.new_empty(*branch.left.shape[1:]), branch.new_empty(*branch.right.shape)
    pass_2.write(left, None, right, None)
    return left, right


@dataclass(frozen=True)
class _Pass2:
    """2 N dS of one loss, or of a block of one, and the products with it."""

    branch: Branch
    rows: Direction
    columns: Direction
    settings: Settings
    total: int  # samples of the batch
    unit: Tensor  # [B] float32: what all is multiplied by, ...
    divisor: int = 1  # ... and divided by
    scale: Tensor | None = None  # s, where the gradients of X and Y are to have it
    scale_partials: Tensor | None = None  # [B, row blocks, column tiles], of a whole batch

    @property
    def dtype(self) -> torch.dtype:
        return self.branch.right.dtype if self.total >= ROUNDED_FROM else torch.float32

    @property
    def gain(self) -> float:
        # float16 has no digits left for a probability of 1e-5, float32 and bfloat16 have.
        return 1024.0 if self.dtype == torch.float16 else 1.0

    def write(
        self,
        left: Tensor | None,  # [B, M, W]: of X
        left_keys: Tensor | None,  # [B, M, W]: of X as the key, by the columns
        right: Tensor | None,  # [B, N, W]: of Y
        add_to_left: Tensor | None,  # [B, M, W]
    ) -> None:
        """Writes the gradients that are given."""
        branch = self.branch
        parts = 1 if self.settings.differentiate_keys else 2
        if left is left_keys is right is None:
            parts = 0
        products = None
        if right is not None:
            in_place = right.dtype == torch.float32
            products = right if in_place else branch.new_empty(*right.shape)
        x = branch.left[0]  # the first term, X rounded to its dtype, beside dS of 16 bits
        if self.dtype == torch.float32 and branch.left.shape[0] > 1:
            x = branch.left.sum(0, dtype=torch.float32)
        for chunk, grad_rows, grad_columns in self.chunks(parts):
            for grad, to, own, pair, add in (
                (grad_rows, left, self.rows, self.columns, add_to_left),
                (grad_columns, left_keys, self.columns, self.rows, None),
            ):
                if to is not None:
                    product = branch.new_empty(*grad.shape[:2], to.shape[-1])
                    _multiply(branch, grad, branch.right, product)
                    factors = branch.right.unsqueeze(0)
                    self._finish(to, product, factors, own, pair, branch.pair_offset, chunk, add)
            if products is not None:
                _multiply(branch, grad_columns.mT, x[:, chunk], products, chunk.start > 0)
        if right is not None and products is not None:
            whole = slice(0, branch.columns)
            of_columns = (self.columns, self.rows, -branch.pair_offset)
            self._finish(right, products, branch.left, *of_columns, whole, None)

    def chunks(self, parts: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields rows, and 2 N dS of them [B, rows, N], of the rows' and the columns' softmax.

        Times the gain, with zeros at the pairs. With one part both are one tensor, their sum; with
        none nothing is yielded, and only the gradient of s is made.
        """
        branch, tile, dtype = self.branch, self.branch.tile, self.dtype
        problems, columns, row_blocks = branch.problems, branch.columns, branch.row_blocks
        pitch = 64 * triton.cdiv(columns, 64)  # rows begin at whole cache lines
        block_bytes = parts * problems * tile.rows * pitch * dtype.itemsize
        fitting = WORKSPACE_BYTES // block_bytes if block_bytes else row_blocks
        at_once = max(1, min(row_blocks, fitting))
        shape = (parts, problems, at_once * tile.rows, pitch)
        workspace = torch.empty(shape, dtype=dtype, device=branch.right.device)
        for first_block in range(0, row_blocks, at_once):
            blocks = min(at_once, row_blocks - first_block)
            kernels.grad_logits_kernel[(problems * blocks * branch.column_tiles,)](
                *branch.operands(),
                *self.rows.operands(),
                *self.columns.operands(),
                workspace[0] if parts else None,
                workspace[1] if parts == 2 else None,
                self.scale_partials,
                *branch.sizes(),
                self.total,
                pitch,
                at_once * tile.rows,
                first_block,
                blocks,
                row_blocks,
                SMOOTHING=self.settings.label_smoothing,
                GAIN=self.gain,
                GROUP=8,
                **branch.constants(),
            )
            if parts:
                first, last = first_block * tile.rows, (first_block + blocks) * tile.rows
                last = min(last, branch.rows)
                chunk = workspace[:, :, : last - first, :columns]
                yield slice(first, last), chunk[0], chunk[-1]

    def _finish(
        self,
        out: Tensor,  # [B, M, W]: the rows of it are written
        product: Tensor,  # [B, rows, W] float32
        factors: Tensor,  # [TERMS, B, N, W]
        own: Direction,  # of the rows of out
        pair: Direction,  # of the rows of factors
        pair_offset: int,
        rows: slice,
        add: Tensor | None,  # [B, M, W]
    ) -> None:
        problems, count, width = out.shape
        tiles = triton.cdiv(product.shape[1], _GRADIENT["BLOCK_ROWS"])
        tiles *= triton.cdiv(width, _GRADIENT["BLOCK_COLUMNS"])
        epilogues.gradient_kernel[(problems * tiles,)](
            out,
            product,
            factors,
            add,
            own.nll,
            own.weight,
            pair.nll if self.settings.differentiate_keys else None,
            pair.weight if self.settings.differentiate_keys else None,
            self.unit,
            self.divisor,
            self.scale,
            count,
            factors.shape[2],
            pair_offset,
            self.total,
            width,
            factors.stride(0),
            rows.start,
            product.shape[1],
            TERMS=factors.shape[0],
            SMOOTHING=self.settings.label_smoothing,
            GAIN=self.gain,
            **_GRADIENT,
        )


def _positives(branch: Branch) -> Tensor:
    # S_ii [B, N] of a whole batch.
    samples, _, _, width, term_stride = branch.sizes()
    positives = branch.new_empty(branch.problems, samples)
    kernels.positives_kernel[(branch.problems * branch.row_blocks,)](
        *branch.operands(),
        positives,
        samples,
        width,
        term_stride,
        branch.row_blocks,
        **branch.constants(),
    )
    return positives


def _scale_gradient(
    partials: Tensor,  # [B, row blocks, column tiles]
    unit: Tensor,  # [B]
    divisor: int,
    add_to: Tensor | None,  # []
) -> Tensor:
    # The gradient of s [], added to add_to.
    out = partials.new_empty(()) if add_to is None else add_to
    epilogues.scale_gradient_kernel[(1,)](
        out,
        partials,
        unit,
        divisor,
        partials.shape[1] * partials.shape[2],
        partials.numel(),
        ACCUMULATE=add_to is not None,
        **_SCALE,
    )
    return out


def _multiply(
    branch: Branch,
    x: Tensor,  # [B, M, K]
    y: Tensor,  # [B, K, W]
    out: Tensor,  # [B, M, W] float32
    accumulate: bool = False,
) -> None:
    # out = x y, or out += x y, in float32 sums
    if branch.rank is not None:
        bounded_product(x, y, branch.rank, "columns", out, accumulate=accumulate)
    elif x.is_cuda and x.dtype != torch.float32:
        beta = int(accumulate)  # 0: out is not read
        torch.baddbmm(out, x, y, out_dtype=torch.float32, beta=beta, out=out)
    else:
        torch.baddbmm(out, x.float(), y.float(), beta=int(accumulate), out=out)

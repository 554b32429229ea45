"""The two passes over one loss, and the workspaces between them.

Nothing here reads a value on the host: shapes alone decide, so a CUDA graph can hold all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from himo_kernels.info_nce.triton import epilogues, kernels
from himo_kernels.info_nce.triton.branch import Branch
from himo_kernels.info_nce.triton.products import bounded_product
from himo_kernels.info_nce.triton.tiles import FUSED

# Blocks of rows in one launch of pass 1. Column partials take 8 bytes for each of them and each
# column: 1 KiB a sample, less than bfloat16 features of width 768, whatever N is.
ROW_BLOCKS_AT_ONCE = 128
# Programs that pass 1 is split into where there are fewer blocks of rows: eight for each
# multiprocessor of the largest chips, so that the last wave is short.
PROGRAMS = 1024
# dS of as many rows as fit. Large enough that the products with it are of some thousand rows at
# N = 32768, where they run at the rate of large ones.
WORKSPACE_BYTES = 256 * 2**20
# Samples from which dS of 16-bit features has 16 bits, for the tensor cores. Below, its products
# cost nothing beside the launches, and the gradients are rounded once, to the features' dtype.
ROUNDED_FROM = 128

_MERGE = {"SLOTS_AT_ONCE": 16, "BLOCK": 128, "num_warps": 4, **FUSED}
_GRADIENT = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128, "num_warps": 4, **FUSED}
_SCALE = {"BLOCK": 4096, "num_warps": 8, **FUSED}


def losses(branch: Branch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [B] and nll of the rows and columns [B, N]: eq. (4) and (5) of the README."""
    problems, samples, tile = branch.problems, branch.samples, branch.tile
    row_blocks = branch.row_blocks
    at_once = min(row_blocks, ROW_BLOCKS_AT_ONCE)
    launches = triton.cdiv(row_blocks, at_once)
    splits = min(
        triton.cdiv(samples, tile.columns), triton.cdiv(PROGRAMS, max(problems, 1) * at_once)
    )
    # Slots of the partials: of the rows, one for each launch folded, of the columns of a launch.
    folded = launches if launches > 1 else 0
    first_slot = splits + folded
    slots = first_slot + at_once
    partials = branch.new_empty(problems, slots, 2, samples)
    positives = branch.new_empty(problems, samples)
    blocks_of_entries = triton.cdiv(samples, _MERGE["BLOCK"])
    merge_grid = (problems * blocks_of_entries,)
    for launch in range(launches):
        first_block = launch * at_once
        blocks = min(at_once, row_blocks - first_block)
        kernels.statistics_kernel[(problems * splits * blocks,)](
            *branch.operands(),
            positives,
            partials,
            *branch.sizes(),
            slots,
            first_slot,
            first_block,
            blocks,
            splits,
            **branch.constants(),
        )
        if folded:
            epilogues.fold_kernel[merge_grid](
                partials, samples, slots, first_slot, blocks, splits + launch, **_MERGE
            )
    row_nll, column_nll = (branch.new_empty(problems, samples) for _ in range(2))
    loss_partials = branch.new_empty(problems, blocks_of_entries)
    epilogues.nll_kernel[merge_grid](
        partials,
        positives,
        row_nll,
        column_nll,
        loss_partials,
        samples,
        slots,
        splits,
        splits,
        folded or at_once,
        SMOOTHING=label_smoothing,
        **_MERGE,
    )
    loss = loss_partials.sum(-1)
    if label_smoothing:
        loss = loss - label_smoothing * _mean_logit(branch)  # eq. (5)
    return loss, row_nll, column_nll


def _mean_logit(branch: Branch) -> Tensor:
    # mean_ij S_ij = s / N^2 (sum_i x_i) . (sum_j y_j): O(N W), no logits
    left = branch.left.sum((0, 2), dtype=torch.float32)  # [B, W]
    right = branch.right.sum(1, dtype=torch.float32)
    return branch.scale.float() / branch.samples**2 * (left * right).sum(-1)


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

    left: Tensor | None = None  # [B, N, W], float32 unless another dtype was asked for
    left_keys: Tensor | None = None  # [B, N, W] float32
    right: Tensor | None = None  # [B, N, W] in the dtype of Y
    scale: Tensor | None = None  # [] float32


def gradients(
    branch: Branch,
    grad_loss: Tensor,  # [*]
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    label_smoothing: float,
    differentiate_keys: bool,
    needs: Needs,
    *,
    add_to: Gradients = Gradients(),
    left_dtype: torch.dtype = torch.float32,
) -> Gradients:
    """Returns the gradients of X, Y and s: eq. (6) and (7).

    Those of X and s include what another loss has left in add_to, in float32.
    """
    if needs == Needs():
        return Gradients()
    grad_loss = grad_loss.reshape(-1).float().contiguous()
    nlls = tuple(nll.reshape(-1, branch.samples).contiguous() for nll in (row_nll, column_nll))
    one_left = needs.left_keys and differentiate_keys  # left and left_keys are one gradient
    shape = branch.right.shape
    left = left_keys = right = products = None
    if needs.left or one_left:
        in_place = add_to.left is not None and left_dtype == torch.float32
        left = add_to.left if in_place else branch.new_empty(*shape, dtype=left_dtype)
    if needs.left_keys and not one_left:
        left_keys = branch.new_empty(*shape)
    if needs.right:
        right = branch.new_empty(*shape, dtype=branch.right.dtype)
        products = branch.new_empty(*shape)
    parts = 1 if differentiate_keys else 2
    if left is left_keys is right is None:
        parts = 0
    pass_2 = _GradLogits(branch, nlls, label_smoothing, parts, needs.scale)

    def finish(
        of: str, product: Tensor, factors: Tensor, out: Tensor, first: int, add: Tensor | None
    ) -> None:
        rows = product.shape[1]
        tiles = triton.cdiv(rows, _GRADIENT["BLOCK_ROWS"])
        tiles *= triton.cdiv(shape[-1], _GRADIENT["BLOCK_COLUMNS"])
        epilogues.gradient_kernel[(shape[0] * tiles,)](
            out,
            product,
            factors,
            add,
            *nlls,
            grad_loss,
            branch.scale,
            branch.samples,
            shape[-1],
            factors.stride(0),
            first,
            rows,
            OF="both" if differentiate_keys else of,
            TERMS=factors.shape[0],
            SMOOTHING=label_smoothing,
            GAIN=pass_2.gain,
            **_GRADIENT,
        )

    y = branch.right.unsqueeze(0)
    x = branch.left[0]  # the first term, X rounded to its dtype, beside dS of 16 bits
    if pass_2.dtype == torch.float32 and branch.left.shape[0] > 1:
        x = branch.left.sum(0, dtype=torch.float32)
    for rows, grad_rows, grad_columns in pass_2.chunks():
        for of, grad, to, add in (
            ("rows", grad_rows, left, add_to.left),
            ("columns", grad_columns, left_keys, None),
        ):
            if to is not None:
                product = branch.new_empty(*grad.shape[:2], shape[-1])
                _multiply(branch, grad, branch.right, product)
                finish(of, product, y, to, rows.start, add)
        if products is not None:
            _multiply(branch, grad_columns.mT, x[:, rows], products, rows.start > 0)
    if right is not None and products is not None:
        finish("columns", products, branch.left, right, 0, None)
    scale = None
    if pass_2.scale_partials is not None:
        scale = _scale_gradient(branch, pass_2.scale_partials, grad_loss, add_to.scale)
    return Gradients(left if needs.left else None, left if one_left else left_keys, right, scale)


class _GradLogits:
    """Pass 2: 2 N dS of one loss, its diagonal at once and the rest a chunk of rows at a time."""

    def __init__(
        self,
        branch: Branch,
        nlls: tuple[Tensor, ...],  # of the rows and of the columns, each [B, N]
        label_smoothing: float,
        parts: int,  # workspaces: none, one, or rows and columns apart
        scale: bool,
    ) -> None:
        self.branch, self.parts = branch, parts
        self.label_smoothing = label_smoothing
        problems, samples, tile = branch.problems, branch.samples, branch.tile
        self.dtype = branch.right.dtype if samples >= ROUNDED_FROM else torch.float32
        # float16 has no digits left for a probability of 1e-5, float32 and bfloat16 have.
        self.gain = 1024.0 if self.dtype == torch.float16 else 1.0
        self.positives = branch.new_empty(problems, samples)
        self.vectors = (self.positives, *nlls)
        self.scale_partials = None
        if scale:
            tiles = triton.cdiv(samples, tile.columns)
            self.scale_partials = branch.new_empty(problems, branch.row_blocks, tiles)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields rows, and 2 N dS of them [B, rows, N], of the rows' and the columns' softmax.

        Times the gain, with zeros on the diagonal. With one workspace both are one tensor, their
        sum; with none nothing is yielded.
        """
        branch, tile, dtype = self.branch, self.branch.tile, self.dtype
        problems, samples, row_blocks = branch.problems, branch.samples, branch.row_blocks
        tiles = triton.cdiv(samples, tile.columns)
        kernels.positives_kernel[(problems * row_blocks,)](
            *branch.operands(), self.positives, *branch.sizes(), row_blocks, **branch.constants()
        )
        pitch = 64 * triton.cdiv(samples, 64)  # rows begin at whole cache lines
        block_bytes = self.parts * problems * tile.rows * pitch * dtype.itemsize
        fitting = WORKSPACE_BYTES // block_bytes if block_bytes else row_blocks
        at_once = max(1, min(row_blocks, fitting))
        shape = (self.parts, problems, at_once * tile.rows, pitch)
        workspace = torch.empty(shape, dtype=dtype, device=branch.right.device)
        for first_block in range(0, row_blocks, at_once):
            blocks = min(at_once, row_blocks - first_block)
            kernels.grad_logits_kernel[(problems * blocks * tiles,)](
                *branch.operands(),
                *self.vectors,
                workspace[0] if self.parts else None,
                workspace[1] if self.parts == 2 else None,
                self.scale_partials,
                *branch.sizes(),
                pitch,
                at_once * tile.rows,
                first_block,
                blocks,
                row_blocks,
                SMOOTHING=self.label_smoothing,
                GAIN=self.gain,
                GROUP=8,
                **branch.constants(),
            )
            if self.parts:
                first, last = first_block * tile.rows, (first_block + blocks) * tile.rows
                last = min(last, samples)
                chunk = workspace[:, :, : last - first, :samples]
                yield slice(first, last), chunk[0], chunk[-1]


def _scale_gradient(
    branch: Branch,
    partials: Tensor,  # [B, row blocks, column tiles]
    grad_loss: Tensor,  # [B]
    add_to: Tensor | None,  # []
) -> Tensor:
    # The gradient of s [], added to add_to.
    out = branch.new_empty() if add_to is None else add_to
    epilogues.scale_gradient_kernel[(1,)](
        out,
        partials,
        grad_loss,
        branch.samples,
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

"""Pass 1: statistics of the logits, and what a loss or a block of a larger one makes of them.

Nothing here reads a value on the host: shapes alone decide, so a CUDA graph can hold all of it.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from himo_kernels.info_nce.triton import epilogues, kernels
from himo_kernels.info_nce.triton.branch import Branch
from himo_kernels.info_nce.triton.tiles import FUSED

# Blocks of rows in one launch. Column partials take 8 bytes for each of them and each column:
# 1 KiB a sample, less than bfloat16 features of width 768, whatever N is.
ROW_BLOCKS_AT_ONCE = 128
# Programs that the pass is split into where there are fewer blocks of rows: eight for each
# multiprocessor of the largest chips, so that the last wave is short.
PROGRAMS = 1024

_MERGE = {"SLOTS_AT_ONCE": 16, "BLOCK": 128, "num_warps": 4, **FUSED}


@dataclass(frozen=True)
class _Partials:
    """Maximum and sum of exp over parts of the negatives of each row and of each column."""

    rows: Tensor  # [B, splits, 2, M] float32
    columns: Tensor  # [B, slots, 2, N] float32
    filled: int  # of the slots, from the first on


def losses(branch: Branch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [B] and nll of the rows and columns [B, N]: eq. (4) and (5) of the README."""
    problems, samples = branch.problems, branch.columns
    positives = branch.new_empty(problems, samples)
    partials = _statistics(branch, positives)
    row_nll, column_nll = (branch.new_empty(problems, samples) for _ in range(2))
    blocks = triton.cdiv(samples, _MERGE["BLOCK"])
    loss_partials = branch.new_empty(problems, blocks)
    epilogues.nll_kernel[(problems * blocks,)](
        partials.rows,
        partials.columns,
        positives,
        row_nll,
        column_nll,
        loss_partials,
        samples,
        partials.rows.shape[1],
        partials.columns.shape[1],
        partials.filled,
        SMOOTHING=label_smoothing,
        **_MERGE,
    )
    loss = loss_partials.sum(-1)
    if label_smoothing:
        loss = loss - label_smoothing * _mean_logit(branch)  # eq. (5)
    return loss, row_nll, column_nll


def log_odds(
    branch: Branch,  # of one problem
    row_positives: Tensor,  # [M] float32
    column_positives: Tensor,  # [N] float32
) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(S_ij - positive) of a block's rows [M] and columns [N], without pairs."""
    partials = _statistics(branch, None)
    found = []
    for positives, of_one, count in (
        (row_positives, partials.rows, partials.rows.shape[1]),
        (column_positives, partials.columns, partials.filled),
    ):
        entries = len(positives)
        found.append(branch.new_empty(entries))
        epilogues.log_odds_kernel[(triton.cdiv(entries, _MERGE["BLOCK"]),)](
            of_one, positives.contiguous(), found[-1], entries, count, **_MERGE
        )
    return found[0], found[1]


def _statistics(branch: Branch, positives: Tensor | None) -> _Partials:
    # Statistics of all negatives; of a whole batch S_ii is written to positives [B, N].
    problems, columns, row_blocks = branch.problems, branch.columns, branch.row_blocks
    at_once = min(row_blocks, ROW_BLOCKS_AT_ONCE)
    launches = triton.cdiv(row_blocks, at_once)
    splits = min(branch.column_tiles, triton.cdiv(PROGRAMS, max(problems, 1) * at_once))
    # Slots of the column partials: one for each launch folded, then those of a launch.
    folded = launches if launches > 1 else 0
    slots = folded + at_once
    of_rows = branch.new_empty(problems, splits, 2, branch.rows)
    of_columns = branch.new_empty(problems, slots, 2, columns)
    for launch in range(launches):
        first_block = launch * at_once
        blocks = min(at_once, row_blocks - first_block)
        kernels.statistics_kernel[(problems * splits * blocks,)](
            *branch.operands(),
            positives,
            of_rows,
            of_columns,
            *branch.sizes(),
            slots,
            folded,
            first_block,
            blocks,
            splits,
            **branch.constants(),
        )
        if folded:
            epilogues.fold_kernel[(problems * triton.cdiv(columns, _MERGE["BLOCK"]),)](
                of_columns, columns, slots, folded, blocks, launch, **_MERGE
            )
    return _Partials(of_rows, of_columns, folded or at_once)


def _mean_logit(branch: Branch) -> Tensor:
    # mean_ij S_ij = s / N^2 (sum_i x_i) . (sum_j y_j): O(N W), no logits
    left = branch.left.sum((0, 2), dtype=torch.float32)  # [B, W]
    right = branch.right.sum(1, dtype=torch.float32)
    return branch.scale.float() / branch.columns**2 * (left * right).sum(-1)

"""Pass 1: statistics of the logits, and from them a loss, or log odds for a block of a loss.

The logits are computed tile by tile and never stored. The order of all sums is fixed, so every run
gives the same bits. No value is read on the host, so a CUDA graph can capture all launches.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels._triton_jit import COUNTS
from himo_kernels.info_nce.triton.logits import Branch, tile_products, up_to_rank
from himo_kernels.info_nce.triton.tiles import FUSED

# Row blocks per launch. Column partials take 8 bytes per row block and column, so at most 1 KiB per
# sample, less than bfloat16 features of width 768, for any N.
ROW_BLOCKS_AT_ONCE = 128
# Number of programs to split the pass into if there are fewer row blocks: eight per multiprocessor
# of the largest GPUs, so that the last wave is short.
PROGRAMS = 1024

_MERGE = {"SLOTS_AT_ONCE": 16, "BLOCK": 128, "num_warps": 4, **FUSED}


@dataclass(frozen=True)
class _Partials:
    """Maximum and sum of exp over parts of the negatives of each row and of each column."""

    rows: Tensor  # [B, splits, 2, M] float32
    columns: Tensor  # [B, slots, 2, N] float32
    filled: int  # the first `filled` slots hold results


def losses(branch: Branch, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [B] and nll of the rows and columns [B, N]: eq. (4) and (5) of the README."""
    problems, samples = branch.problems, branch.columns
    positives = branch.new_empty(problems, samples)
    partials = _statistics(branch, positives)
    row_nll, column_nll = (branch.new_empty(problems, samples) for _ in range(2))
    blocks = triton.cdiv(samples, _MERGE["BLOCK"])
    loss_partials = branch.new_empty(problems, blocks)
    nll_kernel[(problems * blocks,)](
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
    """Returns log sum exp(S_ij - positive) over the negatives of a block's rows and columns."""
    partials = _statistics(branch, None)
    results = []
    for positives, direction, count in (
        (row_positives, partials.rows, partials.rows.shape[1]),
        (column_positives, partials.columns, partials.filled),
    ):
        entries = len(positives)
        results.append(branch.new_empty(entries))
        log_odds_kernel[(triton.cdiv(entries, _MERGE["BLOCK"]),)](
            direction, positives.contiguous(), results[-1], entries, count, **_MERGE
        )
    return results[0], results[1]


def _statistics(branch: Branch, positives: Tensor | None) -> _Partials:
    # Returns the statistics of all negatives. For a whole batch, writes S_ii to positives [B, N].
    problems, columns, row_blocks = branch.problems, branch.columns, branch.row_blocks
    at_once = min(row_blocks, ROW_BLOCKS_AT_ONCE)
    launches = triton.cdiv(row_blocks, at_once)
    splits = min(branch.column_tiles, triton.cdiv(PROGRAMS, max(problems, 1) * at_once))
    # Slots of the column partials: one folded slot per launch, then the slots of this launch.
    folded = launches if launches > 1 else 0
    slots = folded + at_once
    row_partials = branch.new_empty(problems, splits, 2, branch.rows)
    column_partials = branch.new_empty(problems, slots, 2, columns)
    for launch in range(launches):
        first_block = launch * at_once
        blocks = min(at_once, row_blocks - first_block)
        statistics_kernel[(problems * splits * blocks,)](
            *branch.operands(),
            positives,
            row_partials,
            column_partials,
            *branch.sizes(),
            slots,
            folded,
            first_block,
            blocks,
            splits,
            **branch.constants(),
        )
        if folded:
            fold_kernel[(problems * triton.cdiv(columns, _MERGE["BLOCK"]),)](
                column_partials, columns, slots, folded, blocks, launch, **_MERGE
            )
    return _Partials(row_partials, column_partials, folded or at_once)


def _mean_logit(branch: Branch) -> Tensor:
    # mean_ij S_ij = s / N^2 (sum_i x_i) . (sum_j y_j): O(N W), no logits
    left = branch.left.sum((0, 2), dtype=torch.float32)  # [B, W]
    right = branch.right.sum(1, dtype=torch.float32)
    return branch.scale.float() / branch.columns**2 * (left * right).sum(-1)


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
    left_ptr,  # [TERMS, B, M, W]
    right_ptr,  # [B, N, W]
    rank_ptr,  # [B] int64, or None
    scale_ptr,  # []
    positives_ptr,  # [B, M] float32: S_ii of a whole batch, or None
    row_partials_ptr,  # [B, splits, 2, M] float32: maximum and sum of exp over some negatives
    column_partials_ptr,  # [B, slots, 2, N] float32
    row_count,  # M
    column_count,  # N
    pair_offset,
    width,
    term_stride,
    slots,
    first_slot,  # first column slot of this launch
    first_block,  # first row block of this launch
    row_blocks,  # row blocks of this launch
    splits,  # programs that share a row block, each with some of the columns
    TERMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 1: computes the statistics of both directions, and the positives, from one S."""
    # Neighbouring programs visit the same columns, so all but the first read them from L2.
    program = tl.program_id(0)
    block = program % row_blocks
    split = (program // row_blocks) % splits
    problem = (program // (row_blocks * splits)).to(tl.int64)
    scale = tl.load(scale_ptr).to(tl.float32)
    inner = up_to_rank(rank_ptr, problem, width)
    left_ptr += problem * row_count * width
    right_ptr += problem * column_count * width
    row_partials_ptr += (problem * splits + split) * 2 * row_count
    column_partials_ptr += (problem * slots + first_slot + block) * 2 * column_count

    first_row = (first_block + block) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_max = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    per_split = tl.cdiv(tiles, splits)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        first_column = tile * BLOCK_COLUMNS
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        logits = scale * tile_products(
            left_ptr,
            right_ptr,
            first_row,
            first_column,
            row_count,
            column_count,
            width,
            inner,
            term_stride,
            TERMS,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
            PRECISION,
        )
        pairs = rows[:, None] + pair_offset == columns[None, :]
        first_pair = first_row + pair_offset  # column of the first row's pair
        has_pairs = (first_pair < first_column + BLOCK_COLUMNS) & (
            first_pair + BLOCK_ROWS > first_column
        )
        if positives_ptr is not None:
            if has_pairs:  # the pairs of all rows, since BLOCK_ROWS divides BLOCK_COLUMNS
                positives = tl.sum(tl.where(pairs, logits, 0.0), 1)
                at = positives_ptr + problem * row_count + rows
                tl.store(at, positives, mask=rows < row_count)
        ragged = first_row + BLOCK_ROWS > row_count
        ragged |= first_column + BLOCK_COLUMNS > column_count
        if has_pairs | ragged:
            inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
            logits = tl.where(inside & ~pairs, logits, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(logits, 1))
        shift = finite_shift(new_max)
        row_sum = row_sum * tl.exp(row_max - shift)
        row_sum += tl.sum(tl.exp(logits - shift[:, None]), 1)
        row_max = new_max

        column_max = tl.max(logits, 0)
        column_sum = tl.sum(tl.exp(logits - finite_shift(column_max)[None, :]), 0)
        _store(column_partials_ptr, columns, column_count, column_max, column_sum)
    _store(row_partials_ptr, rows, row_count, row_max, row_sum)


@triton.jit
def _store(partials_ptr, index, count, maximum, total):
    # partials_ptr: [2, count]
    tl.store(partials_ptr + index, maximum, mask=index < count)
    tl.store(partials_ptr + count + index, total, mask=index < count)


@triton.jit
def finite_shift(maximum):
    """Returns the maximum to subtract before exp, with 0 for -inf: -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _merged(
    partials_ptr,  # [slots, 2, N] of one problem
    first_slot,
    count,
    entries,  # [BLOCK] int, indices into N
    samples,
    SLOTS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Maximum and sum [BLOCK] over the slots, merged in order: every run gives the same bits.
    total_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, SLOTS_AT_ONCE):
        slot = start + tl.arange(0, SLOTS_AT_ONCE)
        mask = (slot < count)[:, None] & (entries < samples)[None, :]
        at = partials_ptr + (first_slot + slot).to(tl.int64)[:, None] * 2 * samples
        at += entries[None, :]
        maximum = tl.load(at, mask=mask, other=float("-inf"))
        summed = tl.load(at + samples, mask=mask, other=0.0)
        new_max = tl.maximum(total_max, tl.max(maximum, 0))
        shift = finite_shift(new_max)
        total = total * tl.exp(total_max - shift)
        total += tl.sum(summed * tl.exp(maximum - shift[None, :]), 0)
        total_max = new_max
    return total_max, total


@triton.jit(do_not_specialize=COUNTS)
def fold_kernel(
    partials_ptr,  # [B, slots, 2, N] float32
    samples,  # N
    slots,
    first_slot,
    count,
    to_slot,
    SLOTS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges the column partials of one launch into one slot, to reuse its slots."""
    blocks = tl.cdiv(samples, BLOCK)
    entries = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    partials_ptr += problem * slots * 2 * samples
    maximum, total = _merged(
        partials_ptr, first_slot, count, entries, samples, SLOTS_AT_ONCE, BLOCK
    )
    to_ptr = partials_ptr + tl.cast(to_slot, tl.int64) * 2 * samples
    tl.store(to_ptr + entries, maximum, mask=entries < samples)
    tl.store(to_ptr + samples + entries, total, mask=entries < samples)


@triton.jit(do_not_specialize=COUNTS)
def nll_kernel(
    row_partials_ptr,  # [B, row_slots, 2, N] float32
    column_partials_ptr,  # [B, column_slots, 2, N] float32
    positives_ptr,  # [B, N] float32
    row_nll_ptr,  # [B, N] float32
    column_nll_ptr,  # [B, N] float32
    loss_partials_ptr,  # [B, blocks] float32
    samples,
    row_slots,
    column_slots,
    filled,  # column slots
    SMOOTHING: tl.constexpr,
    SLOTS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes nll of both directions, and the block's part of eq. (5) without the mean logit."""
    blocks = tl.cdiv(samples, BLOCK)
    entries = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    valid = entries < samples
    at = problem * samples + entries
    positives = tl.load(positives_ptr + at, mask=valid, other=0.0)
    row_partials_ptr += problem * row_slots * 2 * samples
    column_partials_ptr += problem * column_slots * 2 * samples
    maximum, total = _merged(row_partials_ptr, 0, row_slots, entries, samples, SLOTS_AT_ONCE, BLOCK)
    row_nll = _nll(maximum, total, positives)
    maximum, total = _merged(column_partials_ptr, 0, filled, entries, samples, SLOTS_AT_ONCE, BLOCK)
    column_nll = _nll(maximum, total, positives)
    tl.store(row_nll_ptr + at, row_nll, mask=valid)
    tl.store(column_nll_ptr + at, column_nll, mask=valid)
    terms = (row_nll + column_nll) / 2 + SMOOTHING * positives
    part = tl.sum(tl.where(valid, terms, 0.0)) / samples
    tl.store(loss_partials_ptr + tl.program_id(0), part)


@triton.jit(do_not_specialize=COUNTS)
def log_odds_kernel(
    partials_ptr,  # [slots, 2, N] float32
    positives_ptr,  # [N] float32
    log_odds_ptr,  # [N] float32
    samples,  # N
    count,  # number of filled slots
    SLOTS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes log sum exp(S_ij - S_ii) over the negatives of one direction, to add over blocks."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = entries < samples
    positives = tl.load(positives_ptr + entries, mask=valid, other=0.0)
    maximum, total = _merged(partials_ptr, 0, count, entries, samples, SLOTS_AT_ONCE, BLOCK)
    tl.store(log_odds_ptr + entries, _log_odds(maximum, total, positives), mask=valid)


@triton.jit
def _log_odds(maximum, total, positives):
    # Subtract the two logits, both near 100, first: the difference is exact, and small where
    # accuracy matters.
    return (maximum - positives) + tl.log(total)


@triton.jit
def _nll(maximum, total, positives):
    # log(1 + sum_{j != i} exp(S_ij - S_ii)): eq. (4)
    log_odds = _log_odds(maximum, total, positives)
    return tl.where(log_odds < 0, 0.0, log_odds) + log1p(tl.exp(-tl.abs(log_odds)))


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 to full precision: 2 artanh z, z = x / (2 + x), to z^15."""
    z = x / (2 + x)
    square = z * z
    series = 1.0 / 13 + square * (1.0 / 15)
    for odd in tl.static_range(11, 0, -2):
        series = 1.0 / odd + square * series
    return 2 * z * series

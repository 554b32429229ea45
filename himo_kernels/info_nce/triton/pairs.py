"""info_nce_pairs: one direction, rectangles, positives, labels and exclusions. Not yet run on
hardware.

The tiles of logits are those of the square form. What a pair is follows from the integers of its
row and its column (pairs/plan.py), which the kernels compare in the tile. Pass 1 takes the
statistics of one direction, and runs again with the sides swapped for the other: the products are
made twice there, and nothing of a direction that is not wanted is computed. Pass 2 writes dL/dS of
both directions, a chunk of rows at a time, for two matrix products.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels.aot import Case
from himo_kernels.info_nce.pairs.compose import Problem, Softmax, passes
from himo_kernels.info_nce.triton.grad_logits import (
    GROUP,
    Chunk,
    block_and_tile,
    dtype_of_gradients,
    expm1,
    gain_of,
    in_chunks,
    store,
)
from himo_kernels.info_nce.triton.gradients import multiply
from himo_kernels.info_nce.triton.logits import Branch, features_branch, tile_products
from himo_kernels.info_nce.triton.losses import PROGRAMS, finite_shift

__all__ = ["aot_cases", "info_nce_pairs_bwd", "info_nce_pairs_fwd"]


def statistics(problem: Problem) -> tuple[Tensor, ...]:
    """Returns log and T of the rows [*, N], and of the columns [*, M] if they have losses."""
    of_rows = _statistics(problem)
    if problem.columns is None:
        return of_rows
    turned = problem._replace(
        query=problem.key,
        key=problem.query,
        row_keys=problem.column_keys,
        column_keys=problem.row_keys,
        row_labels=problem.column_labels,
        column_labels=problem.row_labels,
        rows=problem.columns,
    )
    return *of_rows, *_statistics(turned)


def gradients(problem: Problem, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Returns the gradients of query, key and logit_scale; None where not needed."""
    needs_query, needs_key, needs_scale = needs
    branch = features_branch(problem.query, problem.key, problem.logit_scale)
    problems, rows, columns = branch.problems, branch.rows, branch.columns
    width = branch.right.shape[-1]
    dtype = dtype_of_gradients(branch, max(rows, columns))
    gain, parts = gain_of(dtype), int(needs_query or needs_key)
    # Weights are divided by the largest, because those of a mean are too small for float16.
    softmaxes = [side for side in (problem.rows, problem.columns) if side is not None]
    weights = [side.weight.reshape(-1) for side in softmaxes if side.weight is not None]
    largest = torch.cat([*weights, branch.new_empty(1).zero_()]).abs().amax()  # []
    largest = largest.clamp_min(torch.finfo(largest.dtype).tiny)
    of_rows = _of_direction(problem.rows, problems, largest)
    of_columns = (None, None)
    if problem.columns is not None:
        of_columns = _of_direction(problem.columns, problems, largest)
    partials = branch.new_empty(problems, branch.row_blocks, branch.column_tiles)

    def launch(chunk: Chunk) -> None:
        pairs_gradient_kernel[(chunk.programs(branch),)](
            branch.left,
            branch.right,
            branch.scale,
            *_sets(problem, problems),
            *of_rows,
            *of_columns,
            chunk.workspace if parts else None,
            partials if needs_scale else None,
            rows,
            columns,
            width,
            problems,
            *chunk.sizes(),
            branch.row_blocks,
            SMOOTHING=problem.label_smoothing,
            GAIN=gain,
            GROUP=GROUP,
            **_constants(problem, branch),
        )

    of_query = branch.new_empty(problems, rows, width) if needs_query else None
    of_key = branch.new_empty(problems, columns, width) if needs_key else None
    for chunk, (grad,) in in_chunks(branch, parts, dtype, launch):
        if of_query is not None:
            product = branch.new_empty(problems, grad.shape[1], width)
            multiply(branch, grad, branch.right, product)
            of_query[:, chunk] = product
        if of_key is not None:
            multiply(branch, grad.mT, branch.left[0][:, chunk], of_key, chunk.start > 0)
    factor = largest * branch.scale.float() / gain
    return (
        _unpadded(of_query, factor, problem.query),
        _unpadded(of_key, factor, problem.key),
        partials.sum(dtype=torch.float64) * largest if needs_scale else None,
    )


info_nce_pairs_fwd, info_nce_pairs_bwd = passes(statistics, gradients).values()


def _statistics(problem: Problem) -> tuple[Tensor, Tensor]:
    # log and T of the rows [*, N].
    branch = features_branch(problem.query, problem.key, problem.logit_scale)
    problems, rows = branch.problems, branch.rows
    splits = triton.cdiv(PROGRAMS, max(1, problems * branch.row_blocks))
    splits = min(branch.column_tiles, splits)
    # For each part of the columns: log sum exp, and T.
    partials = branch.new_empty(2, problems, splits, rows)
    single, values = _of_direction(problem.rows, problems, None)
    pairs_statistics_kernel[(problems * splits * branch.row_blocks,)](
        branch.left,
        branch.right,
        branch.scale,
        *_sets(problem, problems),
        single,
        values,
        partials[0],
        partials[1],
        rows,
        branch.columns,
        branch.right.shape[-1],
        problems,
        branch.row_blocks,
        splits,
        **_constants(problem, branch),
    )
    log, total = torch.logsumexp(partials[0], 1), partials[1].sum(1)  # [B, N]
    log = torch.where(single >= 0, torch.logaddexp(log, torch.zeros_like(log)), log)
    log = log.masked_fill(log == -torch.inf, 0.0)  # all others are excluded
    shape = problem.query.shape[:-1]
    return log.reshape(shape), total.reshape(shape)


def _constants(problem: Problem, branch: Branch) -> dict[str, object]:
    constants = branch.constants()
    del constants["TERMS"]  # features are one term
    has_labels = problem.row_labels is not None
    return {"EXCLUDE_SELF": problem.exclude_self, "HAS_LABELS": has_labels, **constants}


def _sets(problem: Problem, problems: int) -> tuple[Tensor, Tensor]:
    # Keys, and labels if there are any, of the rows [1 or 2, B, N] and of the columns.
    def joined(*given: Tensor | None) -> Tensor:
        found = [value for value in given if value is not None]
        return torch.stack([value.reshape(problems, value.shape[-1]) for value in found])

    return (
        joined(problem.row_keys, problem.row_labels),
        joined(problem.column_keys, problem.column_labels),
    )


def _of_direction(
    softmax: Softmax, problems: int, largest: Tensor | None
) -> tuple[Tensor, Tensor]:
    # single [B, n], and float32 [3 or 5, B, n]: reference, target, share and, in the backward, log
    # and weight, which is divided by the largest.
    values = [softmax.reference, softmax.target, softmax.share]
    if softmax.log is not None and softmax.weight is not None and largest is not None:
        values += [softmax.log, softmax.weight / largest]
    single = softmax.single
    return single.reshape(problems, single.shape[-1]).contiguous(), torch.stack(
        [value.reshape(problems, value.shape[-1]) for value in values]
    )


def _unpadded(grad: Tensor | None, factor: Tensor, value: Tensor) -> Tensor | None:
    # The gradient [B, n, W] times factor, in the shape of value.
    if grad is None:
        return None
    return grad.mul_(factor)[..., : value.shape[-1]].reshape(value.shape)


@triton.jit
def pairs_statistics_kernel(
    left_ptr,  # [B, N, W]
    right_ptr,  # [B, M, W]
    scale_ptr,  # []
    row_sets_ptr,  # [1 or 2, B, N] int32: keys, labels
    column_sets_ptr,  # [1 or 2, B, M] int32
    single_ptr,  # [B, N] int32
    values_ptr,  # [3, B, N] float32: reference, target, share
    log_ptr,  # [B, splits, N] float32: log sum exp (S - r), without the single positive
    total_ptr,  # [B, splits, N] float32: T
    row_count,  # N
    column_count,  # M
    width,
    problems,
    row_blocks,
    splits,  # programs that share a row block, each with some of the columns
    EXCLUDE_SELF: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 1 of the rows: the statistics of compose.Statistics over some of the columns."""
    # Neighbouring programs visit the same columns, so all but the first read them from L2.
    block = tl.program_id(0) % row_blocks
    split = (tl.program_id(0) // row_blocks) % splits
    problem = (tl.program_id(0) // (row_blocks * splits)).to(tl.int64)
    left_ptr += problem * row_count * width
    right_ptr += problem * column_count * width
    first_row = block * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_mask, at_rows = rows < row_count, problem * row_count + rows
    scale = tl.load(scale_ptr).to(tl.float32)
    single = tl.load(single_ptr + at_rows, mask=row_mask, other=-1)[:, None]
    of_each = problems.to(tl.int64) * row_count
    reference = tl.load(values_ptr + at_rows, mask=row_mask, other=0.0)[:, None]
    target = tl.load(values_ptr + of_each + at_rows, mask=row_mask, other=0.0)[:, None]
    share = tl.load(values_ptr + 2 * of_each + at_rows, mask=row_mask, other=0.0)[:, None]
    row_max = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    per_split = tl.cdiv(tiles, splits)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        first_column = tile * BLOCK_COLUMNS
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        products = tile_products(
            *(left_ptr, right_ptr, first_row, first_column, row_count, column_count, width, width),
            *(0, 1, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION),
        )
        positive, allowed = _pairs(
            *(row_sets_ptr, column_sets_ptr, rows, columns, problem, problems),
            *(row_count, column_count, EXCLUDE_SELF, HAS_LABELS),
        )
        relative = scale * products - reference
        counted = allowed & (columns[None, :] != single)
        weights = tl.where(positive, target, 0.0) + share
        total += tl.sum(tl.where(counted, weights * relative, 0.0), 1)
        relative = tl.where(counted, relative, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(relative, 1))
        shift = finite_shift(new_max)
        row_sum = row_sum * tl.exp(row_max - shift)
        row_sum += tl.sum(tl.exp(relative - shift[:, None]), 1)
        row_max = new_max
    at = (problem * splits + split) * row_count + rows
    tl.store(log_ptr + at, finite_shift(row_max) + tl.log(row_sum), mask=row_mask)
    tl.store(total_ptr + at, total, mask=row_mask)


@triton.jit
def pairs_gradient_kernel(
    left_ptr,  # [B, N, W]
    right_ptr,  # [B, M, W]
    scale_ptr,  # []
    row_sets_ptr,  # [1 or 2, B, N] int32: keys, labels
    column_sets_ptr,  # [1 or 2, B, M] int32
    row_single_ptr,  # [B, N] int32
    row_values_ptr,  # [5, B, N] float32: reference, target, share, log, weight
    column_single_ptr,  # [B, M] int32, or None: the columns have no losses
    column_values_ptr,  # [5, B, M] float32, or None
    grad_ptr,  # [B, chunk, pitch]: GAIN * dL/dS, or None
    scale_partials_ptr,  # [B, row blocks, column tiles] float32, or None
    row_count,  # N
    column_count,  # M
    width,
    problems,
    pitch,
    chunk_rows,
    first_block,  # first row block of this launch
    row_blocks,  # row blocks of this launch
    all_row_blocks,
    SMOOTHING: tl.constexpr,
    GAIN: tl.constexpr,
    GROUP: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 2: recomputes a tile of S, writes dL/dS to the workspace, and its part of ds."""
    tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    problem = (tl.program_id(0) // (row_blocks * tiles)).to(tl.int64)
    program = tl.program_id(0) % (row_blocks * tiles)
    block, tile = block_and_tile(program, row_blocks, tiles, GROUP)
    left_ptr += problem * row_count * width
    right_ptr += problem * column_count * width
    first_row = (first_block + block) * BLOCK_ROWS
    first_column = tile * BLOCK_COLUMNS
    products = tile_products(
        *(left_ptr, right_ptr, first_row, first_column, row_count, column_count, width, width),
        *(0, 1, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION),
    )
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    positive, allowed = _pairs(
        *(row_sets_ptr, column_sets_ptr, rows, columns, problem, problems),
        *(row_count, column_count, EXCLUDE_SELF, HAS_LABELS),
    )
    logits = tl.load(scale_ptr).to(tl.float32) * products
    gradient = _grad_logits(
        *(logits, positive, row_single_ptr, row_values_ptr, problem, problems, rows),
        *(row_count, columns[None, :], SMOOTHING, 1),
    )
    if column_single_ptr is not None:
        gradient += _grad_logits(
            *(logits, positive, column_single_ptr, column_values_ptr, problem, problems, columns),
            *(column_count, rows[:, None], SMOOTHING, 0),
        )
    gradient = tl.where(allowed, gradient, 0.0)
    if scale_partials_ptr is not None:
        at = (problem * all_row_blocks + first_block + block) * tiles + tile
        tl.store(scale_partials_ptr + at, tl.sum(gradient * products))
    if grad_ptr is not None:
        start = (problem * chunk_rows + block * BLOCK_ROWS) * pitch + first_column
        at = tl.arange(0, BLOCK_ROWS)[:, None] * pitch + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
        store(grad_ptr + start + at, gradient * GAIN, inside)


@triton.jit
def _pairs(
    row_sets_ptr,  # [1 or 2, B, N] int32: keys, labels
    column_sets_ptr,  # [1 or 2, B, M] int32
    rows,  # [BLOCK_ROWS]
    columns,  # [BLOCK_COLUMNS]
    problem,
    problems,
    row_count,
    column_count,
    EXCLUDE_SELF: tl.constexpr,
    HAS_LABELS: tl.constexpr,
):
    """Returns which pairs are positive, and which are positive or negative."""
    row_mask, column_mask = rows < row_count, columns < column_count
    row_sets_ptr += problem * row_count + rows
    column_sets_ptr += problem * column_count + columns
    row_keys = tl.load(row_sets_ptr, mask=row_mask, other=-2)
    column_keys = tl.load(column_sets_ptr, mask=column_mask, other=-3)
    inside = row_mask[:, None] & column_mask[None, :]
    positive = inside & (row_keys[:, None] == column_keys[None, :])
    allowed = inside
    if HAS_LABELS:
        row_sets_ptr += problems.to(tl.int64) * row_count
        column_sets_ptr += problems.to(tl.int64) * column_count
        row_labels = tl.load(row_sets_ptr, mask=row_mask, other=-2)
        column_labels = tl.load(column_sets_ptr, mask=column_mask, other=-3)
        allowed &= positive | (row_labels[:, None] != column_labels[None, :])
    if EXCLUDE_SELF:
        other = rows[:, None] != columns[None, :]
        positive &= other
        allowed &= other
    return positive, allowed


@triton.jit
def _grad_logits(
    logits,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    positive,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    single_ptr,  # [B, n] int32, of one direction
    values_ptr,  # [5, B, n] float32: reference, target, share, log, weight
    problem,
    problems,
    own,  # [BLOCK], indices of this direction
    count,  # n
    others,  # indices of the other direction, [1, BLOCK_COLUMNS] or [BLOCK_ROWS, 1]
    SMOOTHING: tl.constexpr,
    AXIS: tl.constexpr,  # of the logits that `own` is broadcast along: 1 for rows, 0 for columns
):
    """Returns w (P - target [positive] - share) of one direction, before exclusions."""
    mask, of_each = own < count, problems.to(tl.int64) * count
    single = tl.load(single_ptr + problem * count + own, mask=mask, other=-1)
    values_ptr += problem * count + own
    reference = tl.expand_dims(tl.load(values_ptr, mask=mask, other=0.0), AXIS)
    target = tl.expand_dims(tl.load(values_ptr + of_each, mask=mask, other=0.0), AXIS)
    share = tl.expand_dims(tl.load(values_ptr + 2 * of_each, mask=mask, other=0.0), AXIS)
    log = tl.expand_dims(tl.load(values_ptr + 3 * of_each, mask=mask, other=0.0), AXIS)
    weight = tl.expand_dims(tl.load(values_ptr + 4 * of_each, mask=mask, other=0.0), AXIS)
    # P - 1 of a single positive is expm1(-log), without cancellation.
    of_single = expm1(-log) + SMOOTHING - share
    gradient = tl.exp((logits - reference) - log) - tl.where(positive, target, 0.0) - share
    return weight * tl.where(others == tl.expand_dims(single, AXIS), of_single, gradient)


def aot_cases() -> Iterator[Case]:
    """Yields the launches that himo_kernels.aot compiles: both tiles, all dtypes, every form."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, columns in ((8192, 16384), (120, 257)):
            label = f"info_nce_pairs {str(dtype)[6:]}, {rows}x{columns}"
            for form, arguments in {
                "labels": (False, True, False),
                "exclusions, both directions": (True, True, True),
            }.items():
                run = partial(_run, rows, columns, dtype, *arguments)
                yield Case(f"{label}, {form}", run, ragged=rows % 16 > 0)


def _run(
    rows: int, columns: int, dtype: torch.dtype, positives: bool, labels: bool, both: bool
) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = (
        meta(rows, 768, dtype=dtype),
        meta(columns, 768, dtype=dtype),
        meta(),
        meta(rows, dtype=torch.int64) if positives else None,
        meta(rows, dtype=torch.int64) if labels else None,
        meta(columns, dtype=torch.int64) if labels else None,
    )
    settings = (both, True, both, 0.1)  # exclude_self, of_rows, of_columns, label_smoothing
    row_losses, column_losses, *rest = info_nce_pairs_fwd(*inputs, *settings)
    arguments: tuple[Any, ...] = (row_losses, column_losses, *inputs, *rest[:2], *settings)
    info_nce_pairs_bwd(*arguments, [True] * 3)

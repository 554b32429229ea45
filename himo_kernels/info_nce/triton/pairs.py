"""The `triton` backend of info_nce_pairs: launches of pair_kernels.py. Not yet run on hardware.

Pass 1 takes the statistics of the rows. If the columns have losses too, it runs again with the
sides swapped, and makes the products again. Pass 2 writes dL/dS of both directions, a chunk of rows
at a time, for two matrix products.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from himo_kernels.aot import Case
from himo_kernels.info_nce.pairs.compose import Problem, Softmax, passes
from himo_kernels.info_nce.triton.grad_logits import (
    GROUP,
    Chunk,
    dtype_of_gradients,
    gain_of,
)
from himo_kernels.info_nce.triton.gradients import products_of
from himo_kernels.info_nce.triton.logits import Branch, features_branch
from himo_kernels.info_nce.triton.losses import PROGRAMS
from himo_kernels.info_nce.triton.pair_kernels import (
    RECORD,
    pairs_gradient_kernel,
    pairs_statistics_kernel,
)

__all__ = ["aot_cases", "info_nce_pairs_bwd", "info_nce_pairs_fwd"]


def statistics(problem: Problem) -> tuple[Tensor, ...]:
    """Returns log and T of the rows [*, N], and of the columns [*, M] if they have losses."""
    of_rows = _statistics(problem)
    if problem.columns is None:
        return of_rows
    transposed = problem._replace(
        query=problem.key,
        key=problem.query,
        row_keys=problem.column_keys,
        column_keys=problem.row_keys,
        row_labels=problem.column_labels,
        column_labels=problem.row_labels,
        rows=problem.columns,
        columns=None,
    )
    return *of_rows, *_statistics(transposed)


def gradients(problem: Problem, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Returns the gradients of query, key and logit_scale; None where not needed."""
    needs_query, needs_key, needs_scale = needs
    branch = _branch(problem)
    problems, rows, columns = branch.problems, branch.rows, branch.columns
    dtype = dtype_of_gradients(branch, max(rows, columns))
    gain, needs_features = gain_of(dtype), needs_query or needs_key
    # Weights are divided by the largest, because the weights of a mean are too small for float16.
    softmaxes = [side for side in (problem.rows, problem.columns) if side is not None]
    weights = [side.weight.reshape(-1) for side in softmaxes if side.weight is not None]
    largest = torch.cat([*weights, branch.new_empty(1).zero_()]).abs().amax()  # []
    largest = largest.clamp_min(torch.finfo(largest.dtype).tiny)
    records = (
        _records(problem.row_keys, problem.row_labels, problem.rows, problems, largest),
        _records(problem.column_keys, problem.column_labels, problem.columns, problems, largest),
    )
    partials = branch.new_empty(problems, branch.row_blocks, branch.column_tiles)

    def launch(chunk: Chunk) -> None:
        pairs_gradient_kernel[(chunk.programs(branch),)](
            branch.left,
            branch.right,
            branch.scale,
            *records,
            chunk.workspace if needs_features else None,
            partials if needs_scale else None,
            rows,
            columns,
            branch.right.shape[-1],
            *chunk.sizes(),
            branch.row_blocks,
            SMOOTHING=problem.label_smoothing,
            GAIN=gain,
            GROUP=GROUP,
            BOTH=problem.columns is not None,
            HAS_LABELS=problem.row_labels is not None,
            **_constants(problem, branch),
        )

    of_query, of_key = products_of(branch, dtype, needs_query, needs_key, launch)
    factor = largest * branch.scale.float() / gain
    return (
        _unpadded(of_query, factor, problem.query),
        _unpadded(of_key, factor, problem.key),
        partials.sum(dtype=torch.float64) * largest if needs_scale else None,
    )


info_nce_pairs_fwd, info_nce_pairs_bwd = passes(statistics, gradients).values()


# By the bytes of an element: the other number of warps spills registers with exclusions.
_WARPS_OF_STATISTICS = {2: {"num_warps": 8}, 4: {"num_warps": 4}}


def _branch(problem: Problem) -> Branch:
    # A tile of 128 x 128 with both directions and exclusions spills its registers.
    branch = features_branch(problem.query, problem.key, problem.logit_scale)
    return dataclasses.replace(branch, small_tiles=True)


def _statistics(problem: Problem) -> tuple[Tensor, Tensor]:
    # log and T of the rows [*, N].
    branch = _branch(problem)
    problems, rows = branch.problems, branch.rows
    splits = triton.cdiv(PROGRAMS, max(1, problems * branch.row_blocks))
    splits = min(branch.column_tiles, splits)
    labels = problem.column_labels
    if labels is not None:
        labels = labels.reshape(problems, branch.columns).contiguous()
    # For each part of the columns. Two tensors, so that both pointers are aligned.
    logs, totals = (branch.new_empty(problems, splits, rows) for _ in range(2))
    pairs_statistics_kernel[(problems * splits * branch.row_blocks,)](
        branch.left,
        branch.right,
        branch.scale,
        _records(problem.row_keys, problem.row_labels, problem.rows, problems),
        problem.column_keys.reshape(problems, branch.columns).contiguous(),
        labels,
        logs,
        totals,
        rows,
        branch.columns,
        branch.right.shape[-1],
        branch.row_blocks,
        splits,
        **_constants(problem, branch) | _WARPS_OF_STATISTICS[branch.right.element_size()],
    )
    log, total = torch.logsumexp(logs, 1), totals.sum(1)  # [B, N]
    has_single = problem.rows.single.reshape(log.shape) >= 0
    log = torch.where(has_single, torch.logaddexp(log, torch.zeros_like(log)), log)
    log = log.masked_fill(log == -torch.inf, 0.0)  # all others are excluded
    shape = problem.query.shape[:-1]
    return log.reshape(shape), total.reshape(shape)


def _constants(problem: Problem, branch: Branch) -> dict[str, object]:
    constants = branch.constants()
    del constants["TERMS"]  # features are one term
    return {"EXCLUDE_SELF": problem.exclude_self, **constants}


def _records(
    key: Tensor,  # [*, n] int32
    label: Tensor | None,  # [*, n] int32
    softmax: Softmax | None,
    problems: int,
    largest: Tensor | None = None,  # []: divides the weights
) -> Tensor:
    # Of rows or columns [B, n, 8]; RECORD says of what.
    fields: dict[str, Tensor | None] = {"key": _as_float32(key)}
    if label is not None:
        fields["label"] = _as_float32(label)
    if softmax is not None:
        target = torch.where(softmax.single >= 0, -1.0, softmax.target)
        fields |= {"reference": softmax.reference, "target": target, "share": softmax.share}
        if softmax.weight is not None and largest is not None:
            fields |= {"log": softmax.log, "weight": softmax.weight / largest}
    zero = torch.zeros(key.shape, device=key.device)
    given = [fields.get(name) for name in RECORD]
    joined = torch.stack([zero if value is None else value for value in given], -1)
    return joined.reshape(problems, key.shape[-1], len(RECORD))


def _as_float32(value: Tensor) -> Tensor:
    # The same bits.
    return value.to(torch.int32).contiguous().view(torch.float32)


def _unpadded(grad: Tensor | None, factor: Tensor, value: Tensor) -> Tensor | None:
    # The gradient [B, n, W] times factor, in the shape of value.
    if grad is None:
        return None
    return grad.mul_(factor)[..., : value.shape[-1]].reshape(value.shape)


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
    arguments: tuple[Any, ...] = (row_losses, column_losses, *inputs, *rest[:4], *settings)
    info_nce_pairs_bwd(*arguments, [True] * 3)

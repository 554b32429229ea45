"""The `cpu` backend of info_nce_pairs: csrc/info_nce_pairs.cpp.

It computes the logits in tiles, which decide about their pairs. It keeps them for the backward only
in the cache of op.py.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from himo_kernels import extension
from himo_kernels.info_nce.pairs.compose import Problem


def row_products(own: Tensor, others: Tensor, places: Tensor) -> Tensor:
    """Returns the product of each row of own and the row of others at its place [*, n]."""
    return extension.load().row_products(own, others, places)


def statistics(problem: Problem) -> tuple[Tensor, ...]:
    """Returns log and T of the rows [*, N], and of the columns [*, M] if they have losses."""
    return tuple(extension.load().info_nce_pairs_fwd(*_arguments(problem)))


def gradients(problem: Problem, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Returns the gradients of query, key and logit_scale; empty if not needed."""
    needs_query, needs_key, _ = needs
    return extension.load().info_nce_pairs_bwd(*_arguments(problem), needs_query, needs_key)


def _arguments(problem: Problem) -> tuple[Any, ...]:
    # The fields of a side's softmax; the ones that only the backward uses are None in the forward.
    sides = [
        [keys, *(value for value in softmax or () if value is not None)]
        for keys, softmax in (
            (problem.row_keys, problem.rows),
            (problem.column_keys, problem.columns),
        )
    ]
    return (
        problem.query,
        problem.key,
        problem.logit_scale,
        *sides,
        problem.row_labels,
        problem.column_labels,
        problem.exclude_self,
        problem.label_smoothing,
        problem.products,
    )

"""Predicted time of the launches with matmuls on an H200, from their SASS: see sass.py."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from himo_kernels import sass

SMS, CLOCK_GHZ = 132, 1.98  # NVIDIA H200 data sheet: SXM, largest clock


def microseconds(
    kernel: str,
    values: Mapping[str, Any],  # the arguments of the launch, constants included
    code: Sequence[sass.Instruction],
    programs: int,
    warps: int,  # of a program
    at_once: int,  # programs that fit on a multiprocessor
) -> float:
    """Returns the predicted microseconds of a launch, or 0 for a kernel whose trips are not known.

    Programs run in waves; the programs of a wave share each multiprocessor. Memory is not modelled.
    """
    if kernel not in TRIPS or not code or not at_once:
        return 0.0
    trips = TRIPS[kernel](values)
    if len(trips) != len(sass.matrix_nest(code)):  # the compiler unrolled a loop
        return 0.0
    waves = math.ceil(programs / (SMS * at_once))
    return waves * sass.cycles(code, trips, warps * at_once) / (1e3 * CLOCK_GHZ)


def _statistics(values: Mapping[str, Any]) -> tuple[int, ...]:
    tiles = math.ceil(values["column_count"] / values["BLOCK_COLUMNS"])
    return math.ceil(tiles / values["splits"]), *_inner(values)


def _inner(values: Mapping[str, Any]) -> tuple[int, ...]:
    return (math.ceil(values["width"] / values["BLOCK_INNER"]),)


# The trips of the loops around the matrix instruction, outermost first.
TRIPS: dict[str, Callable[[Mapping[str, Any]], tuple[int, ...]]] = {
    "_matmul_kernel": lambda values: (math.ceil(values["inner_per_split"] / values["BLOCK_K"]),),
    "statistics_kernel": _statistics,
    "grad_logits_kernel": _inner,
}

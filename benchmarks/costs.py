"""The cost of one call: (case, rank, with_backward) -> FLOPs, and elements read and written.

The formulas are from the cost tables of the operators' READMEs, the same for every candidate.
"""

from collections.abc import Callable

from benchmarks.cases import Case


def moment_flops(case: Case, rank: int, backward: bool) -> float:
    square = case.D if case.op == "covariance" else case.N
    return (4.0 if backward else 2.0) * case.B * case.N * case.D * square


def moment_elements(case: Case, backward: bool) -> float:
    square = (case.D if case.op == "covariance" else case.N) ** 2
    forward = case.B * (case.N * case.D + square)
    return forward + case.B * (2 * case.N * case.D + square) if backward else forward


def hide_flops(case: Case, rank: int, backward: bool) -> float:
    n = min(case.N, case.D)
    forward = 2 * case.N * case.D * n + 9 * n**3 + 4 * case.N * case.D * rank
    extra = 8 * case.N * case.D * n + 8 * n**3 if backward else 0
    return float(case.B * (forward + extra))


def hide_elements(case: Case, backward: bool) -> float:
    return float(case.B * case.N * case.D * (5 if backward else 2))


def normalize_flops(case: Case, rank: int, backward: bool) -> float:
    # Forward: a sum of squares (2) and a product (1). Backward: two sums (4), a difference (2) and
    # a product (1).
    return (10.0 if backward else 3.0) * case.B * case.N * case.D


def normalize_elements(case: Case, backward: bool) -> float:
    return (5.0 if backward else 2.0) * case.B * case.N * case.D


def loss_flops(branches: Callable[[Case, int], float]) -> Callable[[Case, int, bool], float]:
    # One branch: logits in the forward (2); logits again and both gradients in the backward (6).
    return lambda case, rank, backward: (
        (8.0 if backward else 2.0) * case.N**2 * case.D * branches(case, rank)
    )


def loss_elements(count: int) -> Callable[[Case, bool], float]:
    return lambda case, backward: float(case.N * case.D * count * (3 if backward else 1))


one_loss_flops = loss_flops(lambda case, rank: 1)
dual_loss_flops = loss_flops(lambda case, rank: 2)
low_rank_flops = loss_flops(lambda case, rank: 1 + case.inner / case.D)


def pairs_flops(case: Case, rank: int, backward: bool) -> float:
    # N x N logits, N x 2N with hard negatives, 2N x 2N of two views.
    size = {"negatives": 2, "simclr": 4}.get(case.form, 1)
    return size * one_loss_flops(case, rank, backward)


def pairs_elements(case: Case, backward: bool) -> float:
    count = {"negatives": 3, "labels": 1}.get(case.form, 2)
    return loss_elements(count)(case, backward)


def sigmoid_flops(case: Case, rank: int, backward: bool) -> float:
    # Logits (2), and both gradients from the same logits (4).
    return (6.0 if backward else 2.0) * case.B * case.N**2 * case.D


def head_flops(case: Case, rank: int, backward: bool) -> float:
    # The component branch at rank R + 1 (the mean), whether a candidate uses the low rank or not.
    low_rank = loss_flops(lambda case, rank: 1 + (rank + 1) / case.D)
    return hide_flops(case, rank, backward) + low_rank(case, rank, backward)

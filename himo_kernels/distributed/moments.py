"""HiDe over the batch of all ranks: PCA and reconstruction without gathering features.

If the joined batch has at least D rows, ranks exchange D x D moments. With fewer rows, the rows are
smaller than the moments and are gathered. README.md derives both.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from himo_kernels._checks import (
    check_finite_values,
    check_flag,
    check_gap_eps,
    check_variance_floor,
    check_variance_threshold,
)
from himo_kernels._numerics import as_tensor
from himo_kernels.covariance import covariance
from himo_kernels.dispatch import refuse_double_backward
from himo_kernels.distributed.agreement import agree, check_rows
from himo_kernels.distributed.gather import AllGather
from himo_kernels.distributed.wire import Rows, members_of
from himo_kernels.pca import moment as parts
from himo_kernels.pca.api import reconstruct_above
from himo_kernels.pca.op import PCA_RECONSTRUCT
from himo_kernels.pca.reference import floor_of


def pca_reconstruct(
    x: Tensor,  # [M, D]
    variance_threshold: float = 0.9,
    *,
    group: dist.ProcessGroup | None = None,
    variance_floor: float | str = "relative",
    gap_eps: float = 1e-6,
    differentiate_basis: bool = True,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """himo_kernels.pca_reconstruct of the joined rows of all ranks, eq. (1); returns own rows.

    Other arguments are as in `himo_kernels.pca_reconstruct`, and must be equal on every rank.

    Args:
        x: this rank's rows [M, D]; M may differ between ranks and may be 0.
        group: the ranks; None is all of them.

    Returns:
        reconstruction [M, D] of this rank's rows, in x's dtype, and rank [], int64, on the device:
        chosen by process 0 of the group, because processes on different hardware could disagree
        when the cumulative variance is within rounding of tau.

    Raises:
        ValueError, TypeError, NotImplementedError: on every rank, if any rank's arguments are
            wrong, with that rank's number.
    """
    operator = "pca_reconstruct"

    def check() -> None:
        check_variance_threshold(operator, variance_threshold)
        check_variance_floor(operator, variance_floor)
        check_gap_eps(operator, gap_eps)
        check_flag(operator, "differentiate_basis", differentiate_basis)
        check_rows(operator, "x", x)
        # Here, before any rank waits: a rank without rows would not resolve its backend later.
        PCA_RECONSTRUCT.resolve(backend, x)
        if check_flag(operator, "check_finite", check_finite):
            check_finite_values(operator, x=x)

    settings = (variance_threshold, gap_eps, differentiate_basis, backend)
    rows = agree(
        operator,
        members_of(group, operator),
        x,
        check,
        settings=(*settings, variance_floor),
        needs_grad=(isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled(),),
    )
    return reconstruct(floor_of(x.dtype, variance_floor), x, rows, *settings)


def reconstruct(
    floor: tuple[float, float],  # of floor_of
    x: Tensor,  # [M, D]
    rows: Rows,
    variance_threshold: float,
    gap_eps: float,
    differentiate_basis: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """pca_reconstruct, for arguments that all ranks agreed on."""
    if rows.members.size > 1 and x.shape[1] <= rows.total:
        threshold = as_tensor(float(variance_threshold), torch.float64, x.device)
        return MomentPCA.apply(
            x, rows, threshold, floor, float(gap_eps), differentiate_basis, backend
        )
    # N < D: every rank decomposes the N x N side of all rows and differentiates its own rows of
    # the output. The gather's backward sums their gradients of each input row.
    joined = AllGather.apply(x, rows)
    reconstruction, rank = reconstruct_above(
        floor, joined, variance_threshold, float(gap_eps), differentiate_basis, backend
    )
    return reconstruction.split(rows.counts)[rows.rank], rank


class MomentPCA(torch.autograd.Function):
    """pca_reconstruct for D <= N: ranks exchange moments; all in float64."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, D]
        rows: Rows,
        variance_threshold: Tensor,  # [] float64
        floor: tuple[float, float],  # of floor_of
        gap_eps: float,
        differentiate_basis: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        mean, moment = _joined_moment(x, rows, backend)
        chosen = parts.MOMENT.resolve(backend, moment)
        eigenvalues, eigenvectors, rank = parts.decompose(
            moment, mean, rows.total, variance_threshold, floor, chosen
        )
        rank = rows.members.broadcast(rank)
        reconstruction = parts.reconstruct(x, mean, eigenvalues, eigenvectors, rank, chosen)
        ctx.save_for_backward(x, mean, eigenvalues, eigenvectors, rank)
        ctx.rows, ctx.gap_eps, ctx.differentiate_basis = rows, gap_eps, differentiate_basis
        ctx.backend = chosen
        ctx.mark_non_differentiable(rank)
        return reconstruction, rank

    @staticmethod
    def backward(ctx: Any, grad_reconstruction: Tensor, grad_rank: None) -> Any:
        refuse_double_backward("pca_reconstruct")
        x, mean, eigenvalues, eigenvectors, rank = ctx.saved_tensors
        rows, features = ctx.rows, x.shape[1]
        sums = grad_reconstruction.sum(0, dtype=torch.float64)  # [D]
        symmetric = None
        if ctx.differentiate_basis:
            own = parts.grad_projector(grad_reconstruction, x, mean, ctx.backend)
            sums = torch.cat([sums, _pack_triangle(own + own.mT)])
        sums = rows.members.all_reduce(sums)
        if ctx.differentiate_basis:
            symmetric = _unpack_triangle(sums[features:], features)
        grad_x = parts.bwd(
            grad_reconstruction,
            sums[:features] / rows.total,
            x,
            mean,
            symmetric,
            eigenvalues,
            eigenvectors,
            rank,
            ctx.gap_eps,
            ctx.backend,
        )
        return grad_x, None, None, None, None, None, None


def _joined_moment(x: Tensor, rows: Rows, backend: str) -> tuple[Tensor, Tensor]:
    # Mean [D] and centred second moment [D, D] of all rows, float64, from each rank's:
    # C = sum_r (C_r + n_r d_r d_r^T), d_r = mean_r - mean. It subtracts no large sums.
    features = x.shape[1]
    if rows.own:
        mean, moment = covariance(x, dtype=torch.float64, backend=backend)
    else:
        mean = x.new_zeros(features, dtype=torch.float64)
        moment = mean.new_zeros(features, features)
    counts = torch.tensor(rows.counts, dtype=torch.float64, device=x.device)
    means = rows.members.all_gather(mean)  # [size, D]
    joined = (counts.unsqueeze(-1) * means).sum(0) / rows.total
    offset = mean - joined
    moment = moment + rows.own * offset.unsqueeze(-1) * offset
    moment = rows.members.all_reduce(_pack_triangle(moment))
    return joined, _unpack_triangle(moment, features)


def _pack_triangle(symmetric: Tensor) -> Tensor:  # [D, D] -> [D (D + 1) / 2]
    row, column = torch.triu_indices(*symmetric.shape, device=symmetric.device)
    return symmetric[row, column]


def _unpack_triangle(packed: Tensor, size: int) -> Tensor:  # [D (D + 1) / 2] -> [D, D]
    row, column = torch.triu_indices(size, size, device=packed.device)
    symmetric = packed.new_empty(size, size)
    symmetric[row, column] = packed
    symmetric[column, row] = packed
    return symmetric

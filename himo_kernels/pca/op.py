"""Schemas, fakes and autograd of pca, project_reconstruct and pca_reconstruct.

pca and pca_reconstruct save x, and the mean, eigenvalues and eigenvectors of the small side in
float64. All backends save the same tensors, so the backward may use another backend.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from himo_kernels import _triton, extension
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import Backend, Operator, refuse_double_backward, saves_inputs
from himo_kernels.pca import cpu, reference

_TRITON = "himo_kernels.pca.triton"

PCA_OP = Operator(
    "pca",
    {
        "triton": _triton.backend(_TRITON, "pca", _triton.why_not_with_float64),
        "cpu": Backend.of(cpu, "pca", cpu.why_not_decompose),
        "reference": Backend.of(reference, "pca"),
    },
)
PROJECT_RECONSTRUCT = Operator(
    "project_reconstruct",
    {
        "triton": _triton.backend(_TRITON, "project_reconstruct", _triton.why_not_with_float64),
        "cpu": Backend.of(cpu, "project_reconstruct", extension.why_not_for),
        "reference": Backend.of(reference, "project_reconstruct"),
    },
)
PCA_RECONSTRUCT = Operator(
    "pca_reconstruct",
    {
        "triton": _triton.backend(_TRITON, "pca_reconstruct", _triton.why_not_with_float64),
        "cpu": Backend.of(cpu, "pca_reconstruct", cpu.why_not_decompose),
        "reference": Backend.of(reference, "pca_reconstruct"),
    },
)


def _decomposition_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # mean [*, D], eigenvalues [*, n], eigenvectors [*, n, n], rank [*]
    *batch, samples, features = x.shape
    small = min(samples, features)
    return (
        x.new_empty((*batch, features), dtype=torch.float64),
        x.new_empty((*batch, small), dtype=torch.float64),
        x.new_empty((*batch, small, small), dtype=torch.float64),
        x.new_empty(batch, dtype=torch.int64),
    )


def _pca_fwd_fake(
    x: Tensor, variance_threshold: Tensor, floor: Sequence[float], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, eigenvalues, eigenvectors, rank = _decomposition_fake(x)
    components = x.new_empty((*eigenvalues.shape, x.shape[-1]), dtype=torch.float64)
    return mean, eigenvalues, components, rank, eigenvectors


_pca_fwd = PCA_OP.define("fwd", fake=_pca_fwd_fake, decomposes=True)
_pca_bwd = PCA_OP.define("bwd")
ProjectReconstruct = saves_inputs(
    PROJECT_RECONSTRUCT.name, PROJECT_RECONSTRUCT.define("fwd"), PROJECT_RECONSTRUCT.define("bwd")
)


def _pca_reconstruct_fwd_fake(
    x: Tensor, variance_threshold: Tensor, floor: Sequence[float], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, eigenvalues, eigenvectors, rank = _decomposition_fake(x)
    return x.new_empty(x.shape), rank, mean, eigenvalues, eigenvectors


_pca_reconstruct_fwd = PCA_RECONSTRUCT.define(
    "fwd", fake=_pca_reconstruct_fwd_fake, decomposes=True
)
_pca_reconstruct_bwd = PCA_RECONSTRUCT.define("bwd")


def _explained_variance(
    eigenvalues: Tensor, mean: Tensor, samples: int, floor: Sequence[float]
) -> tuple[Tensor, Tensor]:
    # Returns eigenvalues / trace [*, n] and trace [*, 1]; 0 and inf for a batch without variance.
    trace = eigenvalues.sum(-1)
    varies = reference.has_variance(trace, mean, samples, floor) | trace.isnan()
    trace = torch.where(varies, trace, torch.inf).unsqueeze(-1)
    return eigenvalues / trace, trace


class Decompose(torch.autograd.Function):
    """pca: mean, eigenvalues, components, rank and ratio, in the accumulation dtype of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [*, N, D]
        variance_threshold: Tensor,  # [] float64
        floor: Sequence[float],  # from reference.floor_of
        gap_eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        mean, eigenvalues, components, rank, eigenvectors = _pca_fwd(
            x, variance_threshold, floor, backend
        )
        ratio, _ = _explained_variance(eigenvalues, mean, x.shape[-2], floor)
        ctx.save_for_backward(x, mean, eigenvalues, eigenvectors, rank)
        ctx.floor, ctx.gap_eps, ctx.backend = floor, gap_eps, backend
        ctx.mark_non_differentiable(rank)
        dtype = accumulation_dtype(x.dtype)
        # The ratio uses float64 eigenvalues: with large rows they overflow float32.
        return mean.to(dtype), eigenvalues.to(dtype), components.to(dtype), rank, ratio.to(dtype)

    @staticmethod
    def backward(
        ctx: Any,
        grad_mean: Tensor,
        grad_eigenvalues: Tensor,
        grad_components: Tensor,
        grad_rank: None,
        grad_ratio: Tensor,
    ) -> Any:
        refuse_double_backward("pca")
        x, mean, eigenvalues, eigenvectors, rank = ctx.saved_tensors
        ratio, trace = _explained_variance(eigenvalues, mean, x.shape[-2], ctx.floor)
        grad_ratio = grad_ratio.double()
        through_ratio = (grad_ratio - (grad_ratio * ratio).sum(-1, keepdim=True)) / trace
        through_ratio = torch.where(trace.isinf(), 0.0, through_ratio)
        grad_x = _pca_bwd(
            grad_mean.double(),
            grad_eigenvalues.double() + through_ratio,
            grad_components.double(),
            x,
            mean,
            eigenvalues,
            eigenvectors,
            rank,
            ctx.gap_eps,
            ctx.backend,
        )
        return grad_x, None, None, None, None


class PCAReconstruct(torch.autograd.Function):
    """pca_reconstruct: U' and its rank. x is the only saved tensor of size N x D."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [*, N, D]
        variance_threshold: Tensor,  # [] float64
        floor: Sequence[float],  # from reference.floor_of
        gap_eps: float,
        differentiate_basis: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        reconstruction, rank, *decomposition = _pca_reconstruct_fwd(
            x, variance_threshold, floor, backend
        )
        ctx.save_for_backward(x, *decomposition, rank)
        ctx.gap_eps, ctx.differentiate_basis = gap_eps, differentiate_basis
        ctx.backend = backend
        ctx.mark_non_differentiable(rank)
        return reconstruction, rank

    @staticmethod
    def backward(ctx: Any, grad_reconstruction: Tensor, grad_rank: None) -> Any:
        refuse_double_backward("pca_reconstruct")
        grad_x = _pca_reconstruct_bwd(
            grad_reconstruction,
            *ctx.saved_tensors,
            ctx.gap_eps,
            ctx.differentiate_basis,
            ctx.backend,
        )
        return grad_x, None, None, None, None, None

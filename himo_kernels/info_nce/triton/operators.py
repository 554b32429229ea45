"""The kernels of the three operators: signatures and results of reference.py."""

import torch
from torch import Tensor

from himo_kernels.info_nce.triton.branch import (
    Branch,
    factors_branch,
    features_branch,
    kept_factors,
)
from himo_kernels.info_nce.triton.gradients import Gradients, Needs, gradients
from himo_kernels.info_nce.triton.products import bounded_product
from himo_kernels.info_nce.triton.statistics import losses


def info_nce_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    """Returns loss [*], and nll of the rows and of the columns of S, [*, N] each."""
    branch = features_branch(image_features, text_features, logit_scale)
    return _losses(branch, image_features, label_smoothing)


def dual_info_nce_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    component_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    """Returns (loss, row nll, column nll) of the texts, then of the components: eq. (2), (3)."""
    return (
        *info_nce_fwd(image_features, text_features, logit_scale, label_smoothing),
        *info_nce_fwd(image_features, component_features, logit_scale, label_smoothing),
    )


def dual_info_nce_low_rank_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    coefficients: Tensor,  # [*, N, K]
    basis: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
    logit_scale: Tensor,  # []
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    """Returns what dual_info_nce_fwd does of component_features = coefficients @ basis."""
    factors = kept_factors(image_features, coefficients, basis, rank)
    branch = factors_branch(factors, logit_scale)
    return (
        *info_nce_fwd(image_features, text_features, logit_scale, label_smoothing),
        *_losses(branch, image_features, label_smoothing),
    )


def _losses(branch: Branch, features: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    loss, row_nll, column_nll = losses(branch, label_smoothing)
    batch, samples = features.shape[:-2], features.shape[-2]
    return (
        loss.reshape(batch),
        row_nll.reshape(*batch, samples),
        column_nll.reshape(*batch, samples),
    )


def info_nce_bwd(
    grad_loss: Tensor,  # [*]
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    label_smoothing: float,
    differentiate_keys: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    """Returns the gradients of image_features, text_features and logit_scale; empty if unneeded."""
    needs_image, needs_text, needs_scale = needs_grad
    grads = gradients(
        features_branch(image_features, text_features, logit_scale),
        grad_loss,
        row_nll,
        column_nll,
        label_smoothing,
        differentiate_keys,
        Needs(left=needs_image, right=needs_text, scale=needs_scale),
        left_dtype=image_features.dtype,
    )
    return (
        _like(image_features, grads.left),
        _like(text_features, grads.right),
        _like(logit_scale, grads.scale),
    )


def dual_info_nce_bwd(
    grad_global_loss: Tensor,  # [*]
    grad_component_loss: Tensor,  # [*]
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    component_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    component_row_nll: Tensor,  # [*, N]
    component_column_nll: Tensor,  # [*, N]
    label_smoothing: float,
    differentiate_keys: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    """Returns the gradients of images, texts, components and logit_scale; empty if unneeded."""
    needs_image, needs_text, needs_component, needs_scale = needs_grad
    of_text = gradients(
        features_branch(image_features, text_features, logit_scale),
        grad_global_loss,
        row_nll,
        column_nll,
        label_smoothing,
        differentiate_keys,
        Needs(left=needs_image, right=needs_text, scale=needs_scale),
    )
    of_component = gradients(
        features_branch(image_features, component_features, logit_scale),
        grad_component_loss,
        component_row_nll,
        component_column_nll,
        label_smoothing,
        differentiate_keys,
        Needs(left=needs_image, right=needs_component, scale=needs_scale),
        add_to=of_text,
        left_dtype=image_features.dtype,
    )
    return (
        _like(image_features, of_component.left),
        _like(text_features, of_text.right),
        _like(component_features, of_component.right),
        _like(logit_scale, of_component.scale),
    )


def dual_info_nce_low_rank_bwd(
    grad_global_loss: Tensor,  # [*]
    grad_component_loss: Tensor,  # [*]
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    coefficients: Tensor,  # [*, N, K]
    basis: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
    logit_scale: Tensor,  # []
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    component_row_nll: Tensor,  # [*, N]
    component_column_nll: Tensor,  # [*, N]
    label_smoothing: float,
    differentiate_keys: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    """Returns the gradients of images, texts, coefficients, basis and logit_scale."""
    needs_image, needs_text, needs_coefficients, needs_basis, needs_scale = needs_grad
    of_text = gradients(
        features_branch(image_features, text_features, logit_scale),
        grad_global_loss,
        row_nll,
        column_nll,
        label_smoothing,
        differentiate_keys,
        Needs(left=needs_image, right=needs_text, scale=needs_scale),
    )
    factors = kept_factors(image_features, coefficients, basis, rank)
    of_factors = gradients(
        factors_branch(factors, logit_scale),
        grad_component_loss,
        component_row_nll,
        component_column_nll,
        label_smoothing,
        differentiate_keys,
        Needs(left=needs_image, left_keys=needs_basis, right=needs_coefficients, scale=needs_scale),
        add_to=Gradients(scale=of_text.scale),
    )
    # X = V B^T: dV = dX B and dB = dX^T V. B belongs to the texts, so what it gets where keys are
    # constants is the part of dX in which the texts are queries: that of the columns.
    if of_factors.left is not None and of_text.left is not None:
        bounded_product(
            of_factors.left, factors.basis, factors.rank, "inner", of_text.left, accumulate=True
        )
    grad_basis = None
    if of_factors.left_keys is not None:
        grad_basis = torch.empty_like(factors.basis, dtype=torch.float32)
        bounded_product(of_factors.left_keys.mT, factors.image, factors.rank, "rows", grad_basis)
    return (
        _like(image_features, of_text.left),
        _like(text_features, of_text.right),
        _like(coefficients, of_factors.right),
        _like(basis, grad_basis),
        _like(logit_scale, of_factors.scale),
    )


def _like(value: Tensor, grad: Tensor | None) -> Tensor:
    # The gradient in the shape and dtype of value; empty where there is none.
    if grad is None:
        return value.new_empty(0)
    if value.dim():  # without what pads [B, N, D]
        grad = grad[:, : value.shape[-2], : value.shape[-1]].reshape(value.shape)
    return grad.to(value.dtype)

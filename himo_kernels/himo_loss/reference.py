"""The specification of himo_loss: pca_reconstruct, normalize and InfoNCE, one after the other."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from himo_kernels.info_nce import reference as info_nce
from himo_kernels.info_nce.compose import Gradients, Loss, Needs, Settings, Statistics
from himo_kernels.normalize.reference import normalize_bwd, normalize_fwd
from himo_kernels.pca.reference import pca_reconstruct_bwd, pca_reconstruct_fwd, reconstruct


def himo_loss_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # of pca.reference.floor_of
    normalize_components: bool,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    """Returns loss [*] and nll [*, N] of rows and columns, twice, and the decomposition.

    First of the texts, then of their components. The decomposition is mean [*, D], eigenvalues
    [*, n], eigenvectors [*, n, n] and rank [*].
    """
    components, rank, *decomposition = pca_reconstruct_fwd(text_features, variance_threshold, floor)
    keys = normalize_fwd(components) if normalize_components else components
    settings = Settings(label_smoothing)
    contrastive = info_nce.fwd(Loss(image_features, text_features, logit_scale, settings))
    component = info_nce.fwd(Loss(image_features, keys, logit_scale, settings))
    return *contrastive, *component, *decomposition, rank


def himo_loss_bwd(
    grad_contrastive_loss: Tensor,  # [*]
    grad_component_loss: Tensor,  # [*]
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    component_row_nll: Tensor,  # [*, N]
    component_column_nll: Tensor,  # [*, N]
    mean: Tensor,  # [*, D] float64
    eigenvalues: Tensor,  # [*, n] float64
    eigenvectors: Tensor,  # [*, n, n] float64
    rank: Tensor,  # [*] int64
    normalize_components: bool,
    label_smoothing: float,
    differentiate_keys: bool,
    differentiate_basis: bool,
    gap_eps: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the gradients of images, texts and logit_scale; empty where not needed."""
    decomposition = (mean, eigenvalues, eigenvectors, rank)
    components = reconstruct(text_features, *decomposition)
    keys = normalize_fwd(components) if normalize_components else components
    settings = Settings(label_smoothing, differentiate_keys)
    needs = Needs(images=True, keys=(True,), scale=True)
    contrastive = info_nce.bwd(
        Loss(image_features, text_features, logit_scale, settings),
        Statistics(row_nll, column_nll, grad_contrastive_loss),
        needs,
        Gradients(),
    )
    component = info_nce.bwd(
        Loss(image_features, keys, logit_scale, settings),
        Statistics(component_row_nll, component_column_nll, grad_component_loss),
        needs,
        contrastive,
    )
    grad_texts, grad_keys = cast(Tensor, contrastive.keys[0]), cast(Tensor, component.keys[0])
    grad = grad_keys.to(text_features.dtype)
    if normalize_components:
        grad = normalize_bwd(grad, components)
    through_components = pca_reconstruct_bwd(
        grad, text_features, *decomposition, gap_eps, differentiate_basis
    )
    grads = (component.images, grad_texts + through_components, component.scale)
    inputs = (image_features, text_features, logit_scale)
    return tuple(
        cast(Tensor, grad).to(value.dtype) if needed else value.new_empty(0)
        for grad, value, needed in zip(grads, inputs, needs_grad, strict=True)
    )

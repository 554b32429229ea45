"""himo_loss: HiDe and both losses of MoLo in one operator (HiMo-CLIP sections 3.2, 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor

from himo_kernels._checks import (
    check_alike,
    check_finite_values,
    check_flag,
    check_gap_eps,
    check_label_smoothing,
    check_variance_floor,
    check_variance_threshold,
)
from himo_kernels._numerics import as_tensor
from himo_kernels.dispatch import apply_function
from himo_kernels.himo_loss.op import HIMO_LOSS, HiMoLossFunction, Settings
from himo_kernels.info_nce.api import check_keep_logits_mib, check_logit_scale
from himo_kernels.pca.reference import floor_of


class HiMoTerms(NamedTuple):
    """Both losses [*], float32 (float64 for float64 features), and the rank [*], int64."""

    contrastive_loss: Tensor  # eq. (2)
    component_loss: Tensor  # eq. (3)
    rank: Tensor  # of the PCA, on the device


def himo_loss(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor | float,  # []
    *,
    variance_threshold: float = 0.9,
    variance_floor: float | str = "relative",
    normalize_components: bool = True,
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
    differentiate_basis: bool = True,
    gap_eps: float = 1e-6,
    check_finite: bool = False,
    backend: str = "auto",
) -> HiMoTerms:
    """InfoNCE of images against texts, and of images against the texts' principal components.

    Equal to `pca_reconstruct` of the texts, `normalize` of the reconstruction if
    normalize_components is set, then `dual_info_nce` of images, texts and components. A backend may
    compute the component loss in the R + 1 dimensions of the kept components, without the [N, D]
    reconstruction. Features are not normalised: for cosine similarities, normalise them first.

    Args:
        image_features: [*, N, D], N and D >= 1, float16, bfloat16, float32 or float64.
        text_features: [*, N, D], dtype and device of image_features; row i is the caption of
            image i. Leading dimensions are independent problems.
        logit_scale: The multiplier s, not its logarithm: a tensor of one element or a number.
        variance_threshold, variance_floor, gap_eps, differentiate_basis: as in `pca_reconstruct`.
        normalize_components: L2-normalise the reconstructed texts.
        label_smoothing, differentiate_keys: as in `info_nce`, for both losses.
        check_finite: Raise on NaN or inf instead of returning NaN; synchronises with the device.
        backend: "auto", "reference" or "cpu". A named backend never falls back to another.

    Returns:
        contrastive_loss and component_loss [*], and the rank [*]. First-order differentiable in
        the features and logit_scale.

    Raises:
        ValueError: wrong shape or value.
        TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take the features.
    """
    options = (
        *(variance_threshold, variance_floor, normalize_components),
        *(label_smoothing, differentiate_keys, differentiate_basis, gap_eps),
    )
    pair = (image_features, text_features)
    if terms := plain_terms(pair, logit_scale, False, options, check_finite, backend):
        return terms
    name = HIMO_LOSS.name
    features = {"image_features": image_features, "text_features": text_features}
    check_alike(name, features)
    scale = check_logit_scale(name, logit_scale, image_features)
    check_variance_threshold(name, variance_threshold)
    settings = Settings(
        floor_of(text_features.dtype, check_variance_floor(name, variance_floor)),
        check_flag(name, "normalize_components", normalize_components),
        check_label_smoothing(name, label_smoothing),
        check_flag(name, "differentiate_keys", differentiate_keys),
        check_flag(name, "differentiate_basis", differentiate_basis),
        check_gap_eps(name, gap_eps),
    )
    if check_flag(name, "check_finite", check_finite):
        check_finite_values(name, **features, logit_scale=scale)
    logits_budget = check_keep_logits_mib(name, None)
    backend = HIMO_LOSS.resolve(backend, image_features, text_features)
    threshold = as_tensor(float(variance_threshold), torch.float64, text_features.device)
    inputs = (image_features, text_features, scale, threshold)
    return HiMoTerms(*apply_function(HiMoLossFunction, settings, backend, logits_budget, *inputs))


def plain_terms(
    features: tuple[Tensor, Tensor],  # image_features and text_features [*, N, D]
    logit_scale: Tensor | float,  # []
    normalize_features: bool,
    options: tuple[float | str | bool, ...],
    check_finite: bool,
    backend: str,
) -> HiMoTerms | None:
    """Returns the terms of a plain call, or None for any other call; see Operator.plain.

    The features are normalised first if normalize_features is set. The options are those of
    `himo_loss` from variance_threshold to gap_eps, in the order of its signature.
    """
    given = (check_finite, check_keep_logits_mib(HIMO_LOSS.name, None))
    arguments = (logit_scale, normalize_features, *options)
    terms = HIMO_LOSS.plain(backend, given, (False, None), features, *arguments)
    return None if terms is None else HiMoTerms(*terms)

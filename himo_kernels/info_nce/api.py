"""info_nce, dual_info_nce and dual_info_nce_low_rank: MoLo's losses (HiMo-CLIP section 3.3)."""

import os
from operator import is_

import torch
from torch import Tensor

from himo_kernels._checks import (
    check_alike,
    check_device,
    check_features,
    check_finite_values,
    check_flag,
    check_label_smoothing,
    check_number,
    check_rank,
    check_same_as,
    check_shape,
    check_tensor,
    raise_shape,
    raise_type,
    raise_value,
)
from himo_kernels._numerics import accumulation_dtype, as_tensor
from himo_kernels.dispatch import Operator, apply_function
from himo_kernels.info_nce.op import (
    DUAL_INFO_NCE,
    DUAL_INFO_NCE_LOW_RANK,
    INFO_NCE,
    ContrastiveLoss,
)
from himo_kernels.info_nce.pairs.form import (
    SQUARE,
    Values,
    check_form,
    check_form_values,
    loss_of_pairs,
)

LOGITS_VARIABLE = "HIMO_KERNELS_LOGITS_MIB"
# Read once at import: a compiled graph must not depend on a variable that can change later.
_logits_mib = os.environ.get(LOGITS_VARIABLE)

# What a plain call leaves as it is: the pairs, check_finite, keep_logits_mib and the variable.
_PLAIN = (*SQUARE, False, None, None)


def info_nce(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, M, D]
    logit_scale: Tensor | float,  # []
    *,
    directions: str = "both",
    positives: Tensor | None = None,  # [N]
    labels: Values | None = None,  # [N], or [N] and [M]
    same_label: str = "positive",
    exclude_self: bool = False,
    reduction: str = "mean",
    weights: Values | None = None,  # [N], or [N] and [M]
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
    keep_logits_mib: float | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE, mean of images against texts and texts against images (HiMo-CLIP eq. (2)).

    Equal to `(F.cross_entropy(S, arange(N), label_smoothing=eps) + F.cross_entropy(S.T, ...)) / 2`
    with `S = logit_scale * image_features @ text_features.T`. Row i of the images and row i of the
    texts are a pair. Features are not normalised here: do so first for cosine similarities.

    The arguments from directions to weights give other forms, which README.md defines.

    Args:
        image_features: [*, N, D], N and D >= 1, float16, bfloat16, float32 or float64.
        text_features: [*, M, D], dtype and device of image_features. Leading dimensions are
            independent problems.
        logit_scale: The multiplier s itself (already exponentiated, as in open_clip), a tensor of
            one element or a number.
        directions: "rows" is images against texts only, "columns" texts against images.
        positives: int64 or int32, the text of each image. Default: text i of image i, M = N; with
            one direction or labels also M > N.
        labels: int64 or int32, of images and texts; one tensor where both have the same.
        same_label: Pairs of equal labels are "positive" (instead of positives), or are neither
            positive nor negative ("exclude"), except each image's text.
        exclude_self: The pairs (i, i) are neither: for features against themselves.
        reduction: "mean" over the images (texts) that have a positive, then over directions; "sum"
            over images (texts), then the mean over directions; or "none".
        weights: Factors of the losses of images and texts. A mean divides by their sum.
        label_smoothing: eps in [0, 1].
        differentiate_keys: False treats the texts as constants in the loss of images against
            texts, and the images as constants in the loss of texts against images. This is the
            gradient of the released code, whose all-gather returns constants.
        keep_logits_mib: Cache the logits for the backward, instead of recomputing them, if they
            take at most this many MiB (4 N M bytes per loss; twice that with directions="both" and
            differentiate_keys=False in the other forms). Default: the environment variable
            HIMO_KERNELS_LOGITS_MIB as read at import, else a quarter of the available memory, at
            most 1 GiB. Only the `cpu` backend caches.
        check_finite: Raise on NaN or inf instead of returning NaN (synchronises with the device).
        backend: "auto", "reference", "cpu" or "triton". A named backend never falls back.

    Returns:
        Loss [*], float32, or float64 for float64 features. Logits and sums have the same dtype.
        Without a reduction [*, N], for the direction "columns" [*, M]. Differentiable once with
        respect to the features and logit_scale.

    Raises:
        ValueError: wrong shape or value.
        TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take the features.
    """
    name, inputs = INFO_NCE.name, (image_features, text_features)
    pairs = (directions, positives, labels, same_label, exclude_self, reduction, weights)
    settings = (label_smoothing, differentiate_keys, keep_logits_mib, check_finite)
    given = (*pairs, check_finite, keep_logits_mib, _logits_mib)
    arguments = (inputs, logit_scale, label_smoothing, differentiate_keys)
    if losses := INFO_NCE.plain(backend, given, _PLAIN, *arguments):
        return losses[0]
    features = {"image_features": image_features, "text_features": text_features}
    square = all(map(is_, pairs, SQUARE)) and _have_one_shape(*inputs)
    form = None if square else check_form(name, image_features, text_features, *pairs)
    if form is None:
        check_alike(name, features)
        (loss,) = _losses(INFO_NCE, features, {}, logit_scale, *settings, backend)
        return loss * image_features.shape[-2] if reduction == "sum" else loss
    scale, smoothing, budget = _check_settings(name, features, {}, logit_scale, *settings)
    if check_finite:
        check_form_values(name, form, text_features)
    return loss_of_pairs(form, *inputs, scale, smoothing, differentiate_keys, budget, backend)


def nt_xent(
    x: Tensor,  # [*, N, D]
    y: Tensor,  # [*, N, D]
    logit_scale: Tensor | float,  # []
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    keep_logits_mib: float | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """SimCLR's loss of two views of N samples (arXiv 2002.05709, eq. (1)).

    Each of the 2N rows of `Z = cat([x, y])` is to find its other view among all rows but itself.
    Equal to `F.cross_entropy(S, (arange(2N) + N) % 2N)` with `S = logit_scale * Z @ Z.T`, whose
    diagonal is -inf. Features are not normalised here; logit_scale is one over the temperature.

    Arguments and errors are as in `info_nce`.

    Returns:
        Loss [*], the mean over the 2N rows; without a reduction [*, 2N], of x and then of y.
    """
    name = "nt_xent"
    check_alike(name, {"x": x, "y": y})
    if check_flag(name, "check_finite", check_finite):
        check_finite_values(name, x=x, y=y)
    both = torch.cat([x, y], -2)
    samples = x.shape[-2]
    return info_nce(
        both,
        both,
        logit_scale,
        directions="rows",
        positives=torch.arange(2 * samples, device=x.device).roll(samples),
        exclude_self=True,
        reduction=reduction,
        label_smoothing=label_smoothing,
        keep_logits_mib=keep_logits_mib,
        check_finite=check_finite,
        backend=backend,
    )


def dual_info_nce(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    component_features: Tensor,  # [*, N, D]
    logit_scale: Tensor | float,  # []
    *,
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
    keep_logits_mib: float | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """MoLo's two terms: images against texts, and against their components (eq. (2) and (3)).

    Equal to `info_nce(image, text, s), info_nce(image, component, s)` as one operator. Arguments
    and errors are as in `info_nce`; component_features [*, N, D] are the texts reconstructed from
    their principal components.

    Returns:
        global_loss [*] and component_loss [*]; MoLo is `global_loss + weight * component_loss`.
    """
    settings = (label_smoothing, differentiate_keys, keep_logits_mib, check_finite)
    inputs = (image_features, text_features, component_features)
    given = (check_finite, keep_logits_mib, _logits_mib)
    arguments = (inputs, logit_scale, label_smoothing, differentiate_keys)
    losses = DUAL_INFO_NCE.plain(backend, given, _PLAIN[-3:], *arguments)
    if losses is None:
        names = ("image_features", "text_features", "component_features")
        features = dict(zip(names, inputs, strict=True))
        check_alike(DUAL_INFO_NCE.name, features)
        losses = _losses(DUAL_INFO_NCE, features, {}, logit_scale, *settings, backend)
    global_loss, component_loss = losses
    return global_loss, component_loss


def dual_info_nce_low_rank(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    coefficients: Tensor,  # [*, N, K]
    basis: Tensor,  # [*, K, D]
    logit_scale: Tensor | float,  # []
    *,
    rank: Tensor | None = None,  # [*]
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
    keep_logits_mib: float | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """dual_info_nce with low-rank component_features = coefficients @ basis.

    For a PCA, make the mean one more row of the basis:
    `coefficients = cat([ones, (text - mean) @ components.mT], -1)`,
    `basis = cat([mean[None], components])`, `rank = pca.rank + 1`. To normalise component_features,
    scale each row of coefficients; the rank does not change.

    Other arguments are as in `info_nce`.

    Args:
        coefficients: [*, N, K], dtype and device of image_features.
        basis: [*, K, D], dtype and device of image_features.
        rank: [*] int64. Columns of coefficients and rows of basis from this index on are ignored
            (except by check_finite). None or a value above K uses all K, a value below 1 none.

    Returns:
        global_loss [*] and component_loss [*].
    """
    operator = DUAL_INFO_NCE_LOW_RANK.name
    rows = {"image_features": image_features, "text_features": text_features}
    check_alike(operator, rows)
    check_features(operator, "coefficients", coefficients, "[*, N, K]")
    check_same_as(operator, "coefficients", coefficients, "image_features", image_features)
    check_features(operator, "basis", basis, "[*, K, D]")
    check_same_as(operator, "basis", basis, "image_features", image_features)
    *batch, samples, features = image_features.shape
    inner = coefficients.shape[-1]
    check_shape(operator, "coefficients", coefficients, (*batch, samples, inner))
    check_shape(operator, "basis", basis, (*batch, inner, features))
    if rank is None:
        rank = torch.full(batch, inner, dtype=torch.int64, device=image_features.device)
    check_rank(operator, "rank", rank, batch, image_features)
    factors = {"coefficients": coefficients, "basis": basis, "rank": rank}
    settings = (label_smoothing, differentiate_keys, keep_logits_mib, check_finite)
    global_loss, component_loss = _losses(
        DUAL_INFO_NCE_LOW_RANK, rows, factors, logit_scale, *settings, backend
    )
    return global_loss, component_loss


def _have_one_shape(x: object, y: object) -> bool:  # of any objects, not yet checked
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.is_nested or y.is_nested:
        return False
    return x.shape == y.shape


def _losses(
    operator: Operator,
    features: dict[str, Tensor],  # [*, N, D] each, image_features first
    factors: dict[str, Tensor],
    logit_scale: Tensor | float,
    label_smoothing: float,
    differentiate_keys: bool,
    keep_logits_mib: float | None,
    check_finite: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    # The callers have checked features and factors.
    name = operator.name
    settings = (label_smoothing, differentiate_keys, keep_logits_mib, check_finite)
    scale, smoothing, logits_budget = _check_settings(
        name, features, factors, logit_scale, *settings
    )
    inputs = (*features.values(), *factors.values(), scale)
    backend = operator.resolve(backend, *inputs)
    return apply_function(
        ContrastiveLoss, name, smoothing, differentiate_keys, backend, logits_budget, *inputs
    )


def _check_settings(
    operator: str,
    features: dict[str, Tensor],  # image_features first
    factors: dict[str, Tensor],
    logit_scale: Tensor | float,
    label_smoothing: float,
    differentiate_keys: bool,
    keep_logits_mib: float | None,
    check_finite: bool,
) -> tuple[Tensor, float, float | None]:
    # Returns logit_scale, label_smoothing and the budget of cached logits.
    scale = check_logit_scale(operator, logit_scale, features["image_features"])
    label_smoothing = check_label_smoothing(operator, label_smoothing)
    check_flag(operator, "differentiate_keys", differentiate_keys)
    logits_budget = check_keep_logits_mib(operator, keep_logits_mib)
    if check_flag(operator, "check_finite", check_finite):
        check_finite_values(operator, **features, **factors, logit_scale=scale)
    return scale, label_smoothing, logits_budget


def check_keep_logits_mib(operator: str, value: object) -> float | None:
    """Returns the budget of cached logits in bytes, >= 0 or inf; None where nobody has set one."""
    name = "keep_logits_mib"
    if value is None:
        if _logits_mib is None:
            return None
        name = LOGITS_VARIABLE
        try:
            value = float(_logits_mib)
        except ValueError:
            raise_value(operator, name, "to be a number of MiB", _logits_mib)
    number = check_number(operator, name, value)
    if not number >= 0:
        raise_value(operator, name, "to be >= 0", value)
    return 2**20 * number


def check_logit_scale(operator: str, value: Tensor | float, features: Tensor) -> Tensor:
    return check_scalar(operator, "logit_scale", value, features)


def check_scalar(operator: str, argument: str, value: Tensor | float, features: Tensor) -> Tensor:
    """Returns a number, or a tensor of one element on the device of features, as a tensor []."""
    dtype = accumulation_dtype(features.dtype)
    if _is_traced_number(value):
        value = torch.as_tensor(value).to(features.device, dtype)
    if not isinstance(value, Tensor):
        number = check_number(operator, argument, value, dtype)
        return as_tensor(number, dtype, features.device)
    check_tensor(operator, argument, value)
    if value.numel() != 1:
        raise_shape(operator, argument, "[] or [1]", value)
    check_device(operator, argument, value, "image_features", features)
    return value if value.dim() == 0 else value.reshape(())


def _is_traced_number(value: object) -> bool:
    """Whether value is the array [] that torch.compile has for a NumPy number while it traces."""
    return torch.compiler.is_compiling() and type(value).__name__ == "ndarray"


def bias_and_flag(
    operator: str, logit_bias: Tensor | float | bool | None, output_dict: bool
) -> tuple[Tensor | float | None, bool]:
    """Returns the checked logit_bias and output_dict of a call with open_clip's signature.

    They are the fourth and fifth arguments of its losses. In older versions, without a bias,
    output_dict was the fourth, so a bool in the fourth place is output_dict.
    """
    check_flag(operator, "output_dict", output_dict)
    if isinstance(logit_bias, bool):
        if output_dict:
            raise_type(operator, "logit_bias", "to be a number", "bool")
        return None, logit_bias
    if _is_traced_number(logit_bias):
        logit_bias = torch.as_tensor(logit_bias).double()
    if isinstance(logit_bias, Tensor):
        check_tensor(operator, "logit_bias", logit_bias)
        if logit_bias.numel() != 1:  # it would change the softmax
            raise_shape(operator, "logit_bias", "[] or [1]", logit_bias)
    elif logit_bias is not None:
        check_number(operator, "logit_bias", logit_bias)
    return logit_bias, output_dict


def with_logit_bias(loss: Tensor, logit_bias: Tensor | float | None) -> Tensor:
    """Returns the loss of the logits plus the bias: unchanged, if the bias is finite.

    The bias gets a gradient of 0, because DistributedDataParallel waits for a gradient of every
    parameter.
    """
    if logit_bias is None:
        return loss
    if not isinstance(logit_bias, Tensor):
        # float64: 0 times a number beyond float32 is 0 too.
        logit_bias = as_tensor(float(logit_bias), torch.float64, loss.device)
    return loss + (0 * logit_bias.sum()).to(loss.dtype)

"""The `cpu` backend of info_nce and its dual forms: csrc/info_nce.cpp, one loss at a time.

Differs from the reference in memory and work: logits exist a tile at a time, both directions read
each tile once, and the low-rank form multiplies K columns where the dense one multiplies D.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from himo_kernels import extension
from himo_kernels._numerics import accumulation_dtype


def why_not(image_features: Tensor, *_: Tensor) -> str | None:
    """Returns why this backend cannot take the features, or None."""
    if image_features.device.type != "cpu":
        return f"needs CPU tensors, got {image_features.device.type}"
    return extension.why_not()


def info_nce_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
    products: Tensor | None = None,  # [1, *, N, N], written
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [*], and nll of the rows and of the columns of S, [*, N] each."""
    (products,) = _each(products, 1)
    return extension.load().info_nce_fwd(
        image_features, text_features, logit_scale, label_smoothing, products
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
    products: Tensor | None = None,  # [1, *, N, N], what the forward wrote
) -> tuple[Tensor, ...]:
    """Returns the gradients of image_features, text_features and logit_scale; empty if unneeded."""
    inputs = (image_features, text_features, logit_scale)
    settings = (label_smoothing, differentiate_keys)
    grads = _gradients(
        grad_loss, *inputs, row_nll, column_nll, *settings, needs_grad, *_each(products, 1)
    )
    return _in_dtypes(grads, inputs, needs_grad)


def dual_info_nce_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    component_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
    products: Tensor | None = None,  # [2, *, N, N], written
) -> tuple[Tensor, ...]:
    """Returns (loss, row nll, column nll) of the texts, then of the components."""
    forward = extension.load().info_nce_fwd
    settings = (logit_scale, label_smoothing)
    text_products, component_products = _each(products, 2)
    return (
        *forward(image_features, text_features, *settings, text_products),
        *forward(image_features, component_features, *settings, component_products),
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
    products: Tensor | None = None,  # [2, *, N, N], what the forward wrote
) -> tuple[Tensor, ...]:
    """Returns the gradients of images, texts, components and logit_scale; empty if unneeded."""
    needs_image, needs_text, needs_component, needs_scale = needs_grad
    text_products, component_products = _each(products, 2)
    grad_image, grad_text, grad_scale = _gradients(
        grad_global_loss,
        image_features,
        text_features,
        logit_scale,
        row_nll,
        column_nll,
        label_smoothing,
        differentiate_keys,
        [needs_image, needs_text, needs_scale],
        text_products,
    )
    _, grad_component, grad_component_scale = _gradients(
        grad_component_loss,
        image_features,
        component_features,
        logit_scale,
        component_row_nll,
        component_column_nll,
        label_smoothing,
        differentiate_keys,
        [needs_image, needs_component, needs_scale],
        component_products,
        grad_image if needs_image else None,
    )
    grads = (grad_image, grad_text, grad_component, grad_scale + grad_component_scale)
    inputs = (image_features, text_features, component_features, logit_scale)
    return _in_dtypes(grads, inputs, needs_grad)


def dual_info_nce_low_rank_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    coefficients: Tensor,  # [*, N, K]
    basis: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
    logit_scale: Tensor,  # []
    label_smoothing: float,
    products: Tensor | None = None,  # [2, *, N, N], written
) -> tuple[Tensor, ...]:
    """Returns what dual_info_nce_fwd does of component_features = coefficients @ basis."""
    forward = extension.load().info_nce_fwd
    settings = (logit_scale, label_smoothing)
    text_products, component_products = _each(products, 2)
    dtype = accumulation_dtype(image_features.dtype)
    *batch, samples, _ = image_features.shape
    component_outputs = tuple(
        image_features.new_empty(shape, dtype=dtype)
        for shape in (batch, (*batch, samples), (*batch, samples))
    )
    for image, kept_coefficients, kept_basis, own_products, *out in _low_rank_problems(
        rank, image_features, coefficients, basis, component_products, *component_outputs
    ):
        query, key = image.to(dtype), kept_coefficients @ kept_basis
        if _projects(kept_basis):
            query, key = query @ kept_basis.mT, kept_coefficients
        values = forward(query, key, *settings, own_products)
        for target, value in zip(out, values, strict=True):
            target.copy_(value)
    return (
        *forward(image_features, text_features, *settings, text_products),
        *component_outputs,
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
    products: Tensor | None = None,  # [2, *, N, N], what the forward wrote
) -> tuple[Tensor, ...]:
    """Returns the gradients of images, texts, coefficients, basis and logit_scale."""
    needs_image, needs_text, _, _, needs_scale = needs_grad
    text_products, component_products = _each(products, 2)
    dtype = accumulation_dtype(image_features.dtype)
    grad_image, grad_text, grad_scale = _gradients(
        grad_global_loss,
        image_features,
        text_features,
        logit_scale,
        row_nll,
        column_nll,
        label_smoothing,
        differentiate_keys,
        [needs_image, needs_text, needs_scale],
        text_products,
    )
    grad_coefficients = coefficients.new_zeros(coefficients.shape, dtype=dtype)
    grad_basis = basis.new_zeros(basis.shape, dtype=dtype)
    if not needs_image:
        grad_image = image_features.new_zeros(image_features.shape, dtype=dtype)
    for tensors in _low_rank_problems(
        rank,
        image_features,
        coefficients,
        basis,
        component_products,
        grad_component_loss,
        component_row_nll,
        component_column_nll,
        grad_image,
        grad_coefficients,
        grad_basis,
    ):
        grad_scale = grad_scale + _add_component_gradients(
            *tensors,
            logit_scale=logit_scale,
            label_smoothing=label_smoothing,
            differentiate_keys=differentiate_keys,
        )
    grads = (grad_image, grad_text, grad_coefficients, grad_basis, grad_scale)
    inputs = (image_features, text_features, coefficients, basis, logit_scale)
    return _in_dtypes(grads, inputs, needs_grad)


def info_nce_block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M]
    column_positives: Tensor,  # [N]
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(S_ij - positive) of rows [M] and of columns [N], without pairs."""
    return extension.load().info_nce_block_fwd(
        image_features, keys, logit_scale, row_positives, column_positives, offset
    )


def info_nce_block_bwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M]
    row_nll: Tensor,  # [M]
    row_weight: Tensor,  # [M]
    column_positives: Tensor,  # [N]
    column_nll: Tensor,  # [N]
    column_weight: Tensor,  # [N]
    offset: int,
    label_smoothing: float,
    total: int,
    differentiate_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of image_features [M, D] and keys [N, D], without the factor s."""
    return extension.load().info_nce_block_bwd(
        image_features,
        keys,
        logit_scale,
        row_positives,
        row_nll,
        row_weight,
        column_positives,
        column_nll,
        column_weight,
        offset,
        label_smoothing,
        total,
        differentiate_keys,
    )


def _add_component_gradients(
    image: Tensor,  # [N, D]
    coefficients: Tensor,  # [N, R]
    basis: Tensor,  # [R, D]
    products: Tensor | None,  # [N, N]
    grad_loss: Tensor,  # []
    row_nll: Tensor,  # [N]
    column_nll: Tensor,  # [N]
    grad_image: Tensor,  # [N, D], added to
    grad_coefficients: Tensor,  # [N, K], its first R columns written
    grad_basis: Tensor,  # [K, D], its first R rows written
    *,
    logit_scale: Tensor,  # []
    label_smoothing: float,
    differentiate_keys: bool,
) -> Tensor:
    # Returns the gradient of logit_scale. S' = s (V B^T) A^T: a problem of inner dimension R, whose
    # gradient of the projections V B^T carries that of V and of B.
    rank = basis.shape[0]
    image = image.to(basis.dtype)
    # With constant keys V and B take different halves of dS, and only the dense form has both.
    project = differentiate_keys and _projects(basis)
    query, key = (image @ basis.mT, coefficients) if project else (image, coefficients @ basis)
    settings = (label_smoothing, differentiate_keys, [True, True, True])
    sum_of_query = None if project else grad_image
    grad_query, grad_key, grad_scale = _gradients(
        grad_loss, query, key, logit_scale, row_nll, column_nll, *settings, products, sum_of_query
    )
    if project:
        grad_image.addmm_(grad_query, basis)
        grad_coefficients[:, :rank] = grad_key
        grad_basis[:rank] = grad_query.mT @ image
    else:
        grad_coefficients[:, :rank] = grad_key @ basis.mT
        grad_basis[:rank] = coefficients.mT @ grad_key
    return grad_scale


def _projects(basis: Tensor) -> bool:  # [R, D]
    # Whether V B^T has fewer columns than V.
    return basis.shape[0] < basis.shape[1]


def _low_rank_problems(
    rank: Tensor,  # [*] int64
    image_features: Tensor,  # [*, N, D]
    coefficients: Tensor,  # [*, N, K]
    basis: Tensor,  # [*, K, D]
    *others: Tensor | None,  # [*, ...]
) -> Iterator[tuple[Any, ...]]:
    # The views of each problem: images, the first R coefficients and rows of the basis (in the
    # accumulation dtype), and what the others hold. A rank on the CPU is read without a wait.
    dtype = accumulation_dtype(image_features.dtype)
    tensors = (image_features, coefficients, basis, *others)
    flat: list[Any] = [
        None if tensor is None else tensor.reshape(-1, *tensor.shape[rank.dim() :])
        for tensor in tensors
    ]
    for index, kept in enumerate(rank.clamp(0, coefficients.shape[-1]).reshape(-1).tolist()):
        own: list[Any] = [None if tensor is None else tensor[index] for tensor in flat]
        image, own_coefficients, own_basis, *own_others = own
        yield (
            image,
            own_coefficients[:, :kept].to(dtype),
            own_basis[:kept].to(dtype),
            *own_others,
        )


def _gradients(
    grad_loss: Tensor,  # [*]
    query: Tensor,  # [*, N, K]
    key: Tensor,  # [*, N, K]
    logit_scale: Tensor,  # []
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    label_smoothing: float,
    differentiate_keys: bool,
    needs_grad: list[bool],
    products: Tensor | None,  # [*, N, N]
    query_sum: Tensor | None = None,  # [*, N, K]
) -> tuple[Tensor, Tensor, Tensor]:
    # Of query, key and logit_scale, in the accumulation dtype. That of the query is added to
    # query_sum where it is given.
    needs_query, needs_key, _ = needs_grad
    return extension.load().info_nce_bwd(
        grad_loss,
        query,
        key,
        logit_scale,
        row_nll,
        column_nll,
        label_smoothing,
        differentiate_keys,
        needs_query,
        needs_key,
        products,
        query_sum,
    )


def _each(products: Tensor | None, losses: int) -> Sequence[Tensor | None]:
    # The kept products of each loss.
    return [None] * losses if products is None else products.unbind()


def _in_dtypes(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], needs_grad: list[bool]
) -> tuple[Tensor, ...]:
    # Rounded once, to the dtype of each input; empty where it is not needed.
    return tuple(
        grad.to(like.dtype) if needed else like.new_empty(0)
        for grad, like, needed in zip(grads, inputs, needs_grad, strict=True)
    )

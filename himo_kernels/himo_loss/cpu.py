"""The `cpu` backend of himo_loss: the component loss in the R + 1 dimensions of its factors.

torch computes the matmuls, csrc/info_nce.cpp the losses and csrc/pca.cpp the decomposition.
Equation numbers refer to README.md. The rank is on the CPU, so kept and dropped directions are
slices. Problems of a batch run one after the other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from himo_kernels import extension
from himo_kernels.himo_loss.factors import Factors, Texts, component_operands, noise_level
from himo_kernels.pca.cpu import why_not_decompose

# If the gap at the cut, relative to lambda_R, is below _NARROW, a few pairs next to the cut make up
# most of the gradient. Pairs of the _NEAR directions on each side are then summed in float64.
_NARROW = 1e-2
_NEAR = 4


def why_not(image_features: Tensor, *_: Tensor) -> str | None:
    """Returns why this backend cannot decompose texts of this shape, or None."""
    return why_not_decompose(image_features)


def himo_loss_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from pca.reference.floor_of
    normalize_components: bool,
    label_smoothing: float,
    *,
    products: Tensor | None = None,  # [2, *, N, N]
    factors: Tensor | None = None,  # [*, (2 N + D)(n + 1)]
) -> tuple[Tensor, ...]:
    """Returns loss [*], row and column nll [*, N] of both losses, then the decomposition."""
    library = extension.load()
    decomposition = library.pca_decompose(text_features, variance_threshold.item(), floor)
    text_products, component_products = (None, None) if products is None else products.unbind(0)
    contrastive = library.info_nce_fwd(
        image_features, text_features, logit_scale, label_smoothing, text_products
    )
    component = [torch.empty_like(output) for output in contrastive]
    problems = _problems(
        text_features, decomposition, image_features, factors, *component, component_products
    )
    for texts, images, room, *outputs, own_products in problems:
        operands = component_operands(images, texts, normalize_components, room, filled=False)
        computed = library.info_nce_fwd(*operands[:2], logit_scale, label_smoothing, own_products)
        for output, value in zip(outputs, computed, strict=True):
            output.copy_(value)
    return *contrastive, *component, *decomposition


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
    *,
    products: Tensor | None = None,  # [2, *, N, N]
    factors: Tensor | None = None,  # [*, (2 N + D)(n + 1)]
) -> tuple[Tensor, ...]:
    """Returns the gradients of images, texts and logit_scale; empty where not needed."""
    needs_images, needs_texts, _ = needs_grad
    text_products, component_products = (None, None) if products is None else products.unbind(0)
    settings = (label_smoothing, differentiate_keys)
    grad_images, grad_texts, grad_scale = extension.load().info_nce_bwd(
        grad_contrastive_loss,
        image_features,
        text_features,
        logit_scale,
        row_nll,
        column_nll,
        *settings,
        needs_images,
        needs_texts,
        text_products,
        None,
    )
    batched = (
        image_features,
        factors,
        grad_images if needs_images else None,
        grad_texts if needs_texts else None,
        grad_component_loss,
        component_row_nll,
        component_column_nll,
        component_products,
    )
    decomposition = (mean, eigenvalues, eigenvectors, rank)
    for texts, images, room, own_images, own_texts, *loss in _problems(
        text_features, decomposition, *batched
    ):
        operands = component_operands(images, texts, normalize_components, room, filled=True)
        component = _Backward(images, texts, operands, logit_scale, loss, settings)
        grad_scale = grad_scale + component.scale
        if own_images is not None:
            component.add_to_images(own_images)
        if own_texts is not None:
            component.add_to_texts(own_texts, normalize_components, differentiate_basis, gap_eps)
    grads = (grad_images, grad_texts, grad_scale)
    inputs = (image_features, text_features, logit_scale)
    return tuple(
        grad.to(value.dtype) if needed else value.new_empty(0)
        for grad, value, needed in zip(grads, inputs, needs_grad, strict=True)
    )


def _problems(
    text_features: Tensor,  # [*, N, D]
    decomposition: Sequence[Tensor],  # mean, eigenvalues, eigenvectors, rank
    *others: Tensor | None,  # [*, ...]
) -> Iterator[tuple[Any, ...]]:
    # Yields the texts of each problem, and its slice of each other tensor.
    *tensors, rank = decomposition
    lead = rank.dim()

    def of_each(tensor: Tensor | None) -> Sequence[Tensor | None]:
        if tensor is None:
            return [None] * rank.numel()
        return [tensor] if lead == 0 else tensor.flatten(0, lead - 1).unbind(0)

    columns = zip(*map(of_each, (text_features, *tensors, *others)), strict=True)
    for own_rank, (features, mean, values, vectors, *rest) in zip(
        rank.flatten().tolist(), columns, strict=True
    ):
        yield Texts(features, mean, values, vectors, own_rank), *rest


class _Backward:
    """Gradients of the component loss of one problem, from its logits to its features."""

    def __init__(
        self,
        images: Tensor,
        texts: Texts,
        operands: tuple[Tensor, Tensor, Factors | None],
        logit_scale: Tensor,
        loss: Sequence[Tensor],  # gradient of the loss, row nll, column nll, products
        settings: tuple[float, bool],
    ) -> None:
        self.images, self.texts = images, texts
        query, keys, self.factors = operands
        self.low_rank = self.factors is not None and query is not images
        grad_loss, row_nll, column_nll, products = loss
        label_smoothing, differentiate_keys = settings

        self.of_query, self.of_keys, self.scale = extension.load().info_nce_bwd(
            grad_loss,
            query,
            keys,
            logit_scale,
            row_nll,
            column_nll,
            label_smoothing,
            differentiate_keys,
            True,
            True,
            products,
            None,
        )
        # With constant keys, V gets only the row half of dS. The basis is part of the texts, so it
        # gets only the column half, as a block whose rows have weight 0. Both halves minus the row
        # half would cancel where the columns are confident and the rows are not.
        self.of_query_for_basis = self.of_query
        if self.low_rank and not differentiate_keys:
            samples, scale = len(query), logit_scale.to(query.dtype)
            products_of_pairs = (query * keys).sum(1) if products is None else products.diagonal()
            positives = scale * products_of_pairs
            weight = grad_loss.to(query.dtype).expand(samples) / (2 * samples)
            rows, columns = (positives, row_nll, 0 * weight), (positives, column_nll, weight)
            of_columns, _ = extension.load().info_nce_block_bwd(
                query, keys, logit_scale, *rows, *columns, 0, label_smoothing, samples, True
            )
            self.of_query_for_basis = scale * of_columns

    def add_to_images(self, grad_images: Tensor) -> None:
        if self.low_rank and self.factors is not None:
            grad_images.addmm_(self.of_query, self.factors.basis.to(self.of_query.dtype))  # (5)
        else:
            grad_images.add_(self.of_query)

    def add_to_texts(
        self, grad_texts: Tensor, normalize: bool, differentiate_basis: bool, gap_eps: float
    ) -> None:
        texts, features = self.texts, self.texts.features
        if texts.is_nan:
            grad_texts.fill_(torch.nan)
            return
        if self.factors is None:
            grad = self.of_keys
            if normalize:
                grad = extension.load().normalize_bwd(grad, features.to(grad.dtype))
            grad_texts.add_(grad)
            return
        _, coefficients, basis, squares, overlaps, length, keys = self.factors
        rank, dtype = texts.rank, basis.dtype
        if self.low_rank:
            grad_keys, grad_query = self.of_keys.to(dtype), self.of_query_for_basis.to(dtype)
            grad_basis = grad_query.mT @ self.images.to(dtype)  # (6)
        else:
            grad = self.of_keys.to(dtype)
            grad_keys = grad @ basis.mT
            grad_basis = keys.mT @ grad
        # (7)
        grad_coefficients = grad_keys[:, :rank]
        weights = None
        if length is not None:
            reciprocal = torch.where(length == 0, 0.0, 1 / length)
            weights = (grad_keys * keys).sum(1, keepdim=True).mul_(reciprocal).mul_(-reciprocal)
            own = coefficients[:, :rank]
            along = own + overlaps if squares is None else torch.addcmul(overlaps, own, squares)
            grad_coefficients = (grad_coefficients * reciprocal).addcmul_(weights, along)
            shares = weights.mT @ coefficients  # [1, R + 1]
            # Adds M B with M = C^T diag(w) C, except M[:R, :R]: O^T removes that part, and (10)
            # adds it where it is needed.
            grad_basis.addmm_(shares.mT, basis[rank:])
            grad_basis[rank:].addmm_(shares[:, :rank], basis[:rank])
        grad_coefficients = grad_coefficients - grad_coefficients.mean(0)
        grad_mean = grad_basis[rank] / len(features)
        grad_texts.add_(
            _through(
                texts, self.factors, grad_coefficients, grad_basis, grad_mean, weights, gap_eps
            )
            if differentiate_basis
            else _with_constant_basis(texts, self.factors, grad_coefficients, grad_mean)
        )


def _through(
    texts: Texts,
    factors: Factors,
    grad_coefficients: Tensor,  # dC [N, R], centred
    grad_basis: Tensor,  # dB [R + 1, D]
    grad_mean: Tensor,  # [D]
    weights: Tensor | None,  # [N, 1]
    gap_eps: float,
) -> Tensor:
    # (8) to (10)
    centred, coefficients, basis, *_ = factors
    rank, rows, dtype = texts.rank, basis[: texts.rank], basis.dtype
    grad_rows, own = grad_basis[:rank], coefficients[:, :rank]
    basis_grad = _basis_grad(texts, centred, grad_coefficients, grad_rows, gap_eps)
    if texts.feature_side:
        left = torch.cat([grad_coefficients.addmm_(centred, basis_grad), coefficients], 1)
        return left @ torch.cat([rows, basis_grad.mT, grad_mean.unsqueeze(0)])
    # The part of (6) along B = W^T X is a product with X, like K^T X.
    by_x = basis_grad if weights is None else basis_grad + own @ (own.mT @ (weights * own))
    right = torch.cat([grad_rows.addmm_(by_x.mT, centred), grad_mean.unsqueeze(0), rows])
    return torch.cat([coefficients, basis_grad], 1).to(dtype) @ right


def _basis_grad(
    texts: Texts, centred: Tensor, grad_coefficients: Tensor, grad_rows: Tensor, gap_eps: float
) -> Tensor:
    # K = O (F * (O^T E)) [n, R], O the dropped directions: (8), (9).
    values, vectors, rank = texts.eigenvalues, texts.eigenvectors, texts.rank
    if texts.feature_side:
        long_side, of_long, of_small = centred.mT, grad_coefficients, grad_rows.mT
    else:
        long_side, of_long, of_small = centred, grad_rows.mT, grad_coefficients
    dropped = vectors[:, rank:].to(centred.dtype)
    pairs = dropped.mT @ torch.addmm(of_small, long_side, of_long)
    last_kept = values[rank - 1].clamp(min=0)  # divides gaps: lambda^2 may overflow
    last_kept = torch.where(last_kept > 0, last_kept, 1.0)
    gaps = (values[:rank] - values[rank:].unsqueeze(1)).div_(last_kept)
    if centred.dtype != torch.float64 and gaps[0, -1] < _NARROW:
        first, last = max(0, rank - _NEAR), rank + _NEAR
        near = vectors[:, rank:last]
        across = long_side.double().mT @ near
        pairs[:_NEAR, first:] = across.mT @ of_long[:, first:].double()
        pairs[:_NEAR, first:] += near.mT @ of_small[:, first:].double()
    pair_weights = gaps / gaps.square().add_(gap_eps**2).mul_(last_kept)
    if gap_eps == 0:
        pair_weights.nan_to_num_(0.0)  # 0 / 0 where two eigenvalues are equal
    return dropped @ pairs.mul_(pair_weights)


def _with_constant_basis(
    texts: Texts, factors: Factors, grad_coefficients: Tensor, grad_mean: Tensor
) -> Tensor:
    # G Pi only. On the sample side the rows of B are the components times sqrt(lambda).
    _, _, basis, squares, *_ = factors
    if squares is not None:
        values = texts.eigenvalues
        present = values[: texts.rank] > noise_level(values)
        inverse = torch.where(present, 1 / values[: texts.rank], 0.0).to(basis.dtype)
        grad_coefficients = grad_coefficients * inverse
    return torch.addmm(grad_mean, grad_coefficients, basis[: texts.rank])

"""Forms of info_nce other than the square one: a dense formula, and drawn problems."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import himo_kernels
from himo_kernels.testing import power_law

Values = Tensor | tuple[Tensor, Tensor]


def masks(
    rows: int,
    columns: int,
    positives: Tensor | None = None,
    labels: Values | None = None,
    same_label: str = "positive",
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns which pairs are positive and which count at all [N, M], one pair at a time."""
    positive = torch.zeros(rows, columns, dtype=torch.bool)
    allowed = torch.ones(rows, columns, dtype=torch.bool)
    pair = labels if isinstance(labels, tuple) else (labels, labels)
    of_rows, of_columns = ([] if value is None else value.tolist() for value in pair)
    own = list(range(rows)) if positives is None else positives.tolist()
    for i in range(rows):
        for j in range(columns):
            same = labels is not None and of_rows[i] == of_columns[j]
            if labels is not None and same_label == "positive":
                positive[i, j] = same
            else:
                positive[i, j] = own[i] == j
                allowed[i, j] = own[i] == j or not same
            if exclude_self and i == j:
                positive[i, j] = allowed[i, j] = False
    return positive, allowed


def dense_losses(logits: Tensor, positive: Tensor, allowed: Tensor, smoothing: float) -> Tensor:
    """Returns the loss of each row [N], by F.log_softmax of what the row allows."""
    losses = []
    for row, own, kept in zip(logits, positive, allowed, strict=True):
        if not own.any():
            losses.append((row * 0).sum())
            continue
        log_p = F.log_softmax(row[kept], 0)
        losses.append(-(1 - smoothing) * log_p[own[kept]].mean() - smoothing * log_p.mean())
    return torch.stack(losses)


def dense(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [M, D]
    logit_scale: Tensor,
    *,
    directions: str = "both",
    reduction: str = "mean",
    weights: Values | None = None,
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
    **pairs: object,
) -> Tensor:
    """Returns info_nce by F.cross_entropy on dense logits, in the dtype of the features."""
    positive, allowed = masks(len(image_features), len(text_features), **pairs)
    if weights is not None and not isinstance(weights, tuple):
        weights = (weights, weights)

    def direction(own: Tensor, keys: Tensor, mine: Tensor, kept: Tensor, index: int) -> Tensor:
        keys = keys if differentiate_keys else keys.detach()
        losses = dense_losses(logit_scale * own @ keys.T, mine, kept, label_smoothing)
        weight = torch.ones_like(losses) if weights is None else weights[index].to(losses.dtype)
        losses = weight * losses
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        divisor = weight[mine.any(1)].sum()
        return losses.sum() / divisor if divisor else losses.sum()

    rows = (image_features, text_features, positive, allowed, 0)
    columns = (text_features, image_features, positive.T, allowed.T, 1)
    if directions != "both":
        return direction(*(rows if directions == "rows" else columns))
    return (direction(*rows) + direction(*columns)) / 2


def features(
    rows: int,
    columns: int,
    width: int = 5,
    *,
    batch: tuple[int, ...] = (),
    scale: float = 10.0,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Returns the differentiable inputs; rows of features have length 1."""
    settings = {"batch": batch, "dtype": dtype, "generator": generator, "normalize": width > 1}
    return {
        "image_features": power_law(rows, width, **settings),
        "text_features": power_law(columns, width, **settings),
        "logit_scale": torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32)),
    }


def loss_and_gradients(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    **options: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss, and the gradients in every input of the sum of its entries times 1 to 2."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    loss = function(**leaves, **options)
    incoming = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    # A direction of constant keys leaves one side without a gradient.
    gradients = torch.autograd.grad(loss, list(leaves.values()), incoming, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def assert_equal_to_dense(
    backend: str, inputs: Mapping[str, Tensor], tolerance: float = 1e-12, **options: object
) -> None:
    """Asserts loss and gradients equal to those of `dense`, relative to the norm or to 1."""
    loss, gradients = loss_and_gradients(himo_kernels.info_nce, inputs, backend=backend, **options)
    expected, exact = loss_and_gradients(dense, inputs, **options)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for name, gradient in exact.items():
        assert gradients[name].shape == gradient.shape
        error = (gradients[name] - gradient).norm().item() / max(1.0, gradient.norm().item())
        assert error <= tolerance, f"gradient of {name}: error {error:.3e}"

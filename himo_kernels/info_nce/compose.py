"""Builds the three operators from one loss. A backend implements its `fwd` and `bwd` only.

Each operator is a list of losses that share the images and the logit scale (LOSSES). Each loss adds
its gradients of images and scale to the sum of the previous losses, so the sum is rounded once and
only one gradient is allocated.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor

# The keys of each loss of an operator, in the order of its schema.
LOSSES: dict[str, tuple[tuple[str, ...], ...]] = {
    "info_nce": (("text_features",),),
    "dual_info_nce": (("text_features",), ("component_features",)),
    "dual_info_nce_low_rank": (("text_features",), ("coefficients", "basis", "rank")),
}


class Factors(NamedTuple):
    """Keys U = C B, using only the first `rank` columns of C and rows of B."""

    coefficients: Tensor  # C [*, N, K]
    basis: Tensor  # B [*, K, D]
    rank: Tensor  # [*] int64; above K means K, below 0 means 0


class Settings(NamedTuple):
    """Arguments that are not tensors and are the same for all losses of a call."""

    label_smoothing: float
    differentiate_keys: bool = True  # used by the backward only


class Direction(NamedTuple):
    """The saved statistics of the row or the column softmax, and its incoming gradient."""

    positives: Tensor  # [*, n]: logit of the positive of each row (column)
    nll: Tensor  # [*, n], over the whole batch
    weight: Tensor | None = None  # [*, n]: gradient of each nll; None (a whole batch): 1


class Loss(NamedTuple):
    """One InfoNCE loss with logits S = s V U^T."""

    image_features: Tensor  # V [*, N, D]
    keys: Tensor | Factors  # U [*, N, D]
    logit_scale: Tensor  # s []
    settings: Settings
    products: Tensor | None = None  # V U^T [*, N, N]: cache, written by fwd, read by bwd


class Statistics(NamedTuple):
    """The saved statistics of a loss, and the gradient of its output."""

    row_nll: Tensor  # [*, N]
    column_nll: Tensor  # [*, N]
    grad_loss: Tensor  # [*]


class Needs(NamedTuple):
    """Which gradients a backward computes."""

    images: bool
    keys: tuple[bool, ...]  # (keys,) or (coefficients, basis)
    scale: bool
    # Whether this is the last loss to add to the gradients of images and scale. The last loss must
    # return them in the shapes of the inputs; earlier losses may use any layout.
    last: bool = True


class Gradients(NamedTuple):
    """Gradients in any dtype; this module rounds them to the dtype of their inputs.

    Gradients that are not needed are ignored. The gradients of images and scale include add_to, the
    sum of the earlier losses.
    """

    images: Tensor | None = None  # [*, N, D]
    scale: Tensor | None = None  # []
    keys: tuple[Tensor | None, ...] = ()  # (keys,) or (coefficients, basis)


class Forward(Protocol):
    """Returns loss [*], row nll [*, N] and column nll [*, N]."""

    def __call__(self, loss: Loss) -> tuple[Tensor, Tensor, Tensor]: ...


class Backward(Protocol):
    """Returns the gradients of a loss, with add_to added for images and scale."""

    def __call__(
        self, loss: Loss, statistics: Statistics, needs: Needs, add_to: Gradients
    ) -> Gradients: ...


def input_names(operator: str) -> tuple[str, ...]:
    """Returns the inputs of an operator in schema order. All but rank are differentiable."""
    return "image_features", *itertools.chain(*LOSSES[operator]), "logit_scale"


def passes(operator: str, fwd: Forward, bwd: Backward) -> dict[str, Callable[..., Any]]:
    """Returns the `fwd` and `bwd` of an operator, with its schema's arguments."""
    return {"fwd": partial(_fwd, operator, fwd), "bwd": partial(_bwd, operator, bwd)}


def _fwd(
    operator: str, fwd: Forward, *arguments: Any, products: Tensor | None = None
) -> tuple[Tensor, ...]:
    # Returns (loss, row nll, column nll) of each loss, concatenated.
    *inputs, label_smoothing = arguments
    named = dict(zip(input_names(operator), inputs, strict=True))
    losses = _losses(operator, named, Settings(label_smoothing), products)
    return tuple(itertools.chain.from_iterable(map(fwd, losses)))


def _bwd(
    operator: str, bwd: Backward, *arguments: Any, products: Tensor | None = None
) -> tuple[Tensor, ...]:
    # Returns one gradient for each input except rank, in its dtype; empty if not needed.
    *tensors, label_smoothing, differentiate_keys, needs_grad = arguments
    names, count = input_names(operator), len(LOSSES[operator])
    grad_losses, tensors = tensors[:count], tensors[count:]
    inputs = dict(zip(names, tensors, strict=False))
    nlls = tensors[len(names) :]
    pairs = zip(nlls[::2], nlls[1::2], strict=True)
    needed = dict(zip((name for name in names if name != "rank"), needs_grad, strict=True))
    gradients: dict[str, Tensor | None] = {}
    shared = Gradients()
    losses = _losses(operator, inputs, Settings(label_smoothing, differentiate_keys), products)
    for index, (loss, grad_loss, nll) in enumerate(zip(losses, grad_losses, pairs, strict=True)):
        keys = [name for name in LOSSES[operator][index] if name in needed]
        needs = Needs(
            needed["image_features"],
            tuple(needed[name] for name in keys),
            needed["logit_scale"],
            last=index == count - 1,
        )
        shared = bwd(loss, Statistics(*nll, grad_loss), needs, shared)
        gradients.update(zip(keys, shared.keys, strict=False))
    gradients |= {"image_features": shared.images, "logit_scale": shared.scale}
    return tuple(
        _in_dtype(inputs[name], gradients[name] if need else None) for name, need in needed.items()
    )


def _losses(
    operator: str, inputs: dict[str, Tensor], settings: Settings, products: Tensor | None
) -> Iterator[Loss]:
    for index, names in enumerate(LOSSES[operator]):
        keys = [inputs[name] for name in names]
        yield Loss(
            inputs["image_features"],
            keys[0] if len(keys) == 1 else Factors(*keys),
            inputs["logit_scale"],
            settings,
            None if products is None else products[index],
        )


def _in_dtype(value: Tensor, grad: Tensor | None) -> Tensor:
    return value.new_empty(0) if grad is None else grad.to(value.dtype)

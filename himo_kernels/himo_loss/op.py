"""Schemas, fakes and autograd of himo_loss.

Every backend saves the same tensors for the backward: the inputs, the float64 decomposition of the
texts, and the nll of both losses. So any backend's backward accepts any other backend's forward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import Backend, Operator, empty_gradients, refuse_double_backward
from himo_kernels.himo_loss import cpu, reference
from himo_kernels.memory import cache_for

HIMO_LOSS = Operator(
    "himo_loss",
    {
        "cpu": Backend.of(cpu, "himo_loss", cpu.why_not, plain=cpu.plain),
        "reference": Backend.of(reference, "himo_loss"),
    },
)
# Backends that can cache the logits and factors for the backward.
CACHING_BACKENDS = ("cpu",)


class Settings(NamedTuple):
    """The arguments of a call that are not tensors."""

    floor: tuple[float, float]  # from pca.reference.floor_of
    normalize_components: bool
    label_smoothing: float
    differentiate_keys: bool
    differentiate_basis: bool
    gap_eps: float


def _fwd_fake(
    image_features: Tensor,
    text_features: Tensor,
    *settings: Any,
    products: Any = None,
    factors: Any = None,
) -> tuple[Tensor, ...]:
    *batch, samples, features = text_features.shape
    small = min(samples, features)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return text_features.new_empty((*batch, *shape), dtype=dtype)

    dtype = accumulation_dtype(text_features.dtype)
    losses = [empty(*shape, dtype=dtype) for shape in ((), (samples,), (samples,)) * 2]
    rank = empty(dtype=torch.int64)
    return (*losses, empty(features), empty(small), empty(small, small), rank)


def _bwd_fake(
    grad_contrastive: Tensor,
    grad_component: Tensor,
    *arguments: Any,
    products: Any = None,
    factors: Any = None,
) -> tuple[Tensor, ...]:
    return empty_gradients(arguments[:3], arguments[-2])


# Two caches, written by fwd and read by bwd. products [2, *, N, N]: the logits of both losses, not
# yet scaled. factors [*, (2 N + D)(n + 1)]: C, B and A of README.md (1) and (3).
_FWD = HIMO_LOSS.define(
    "fwd",
    "(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor variance_threshold, "
    "float[] floor, bool normalize_components, float label_smoothing, str backend, *, "
    "Tensor(a!)? products=None, Tensor(b!)? factors=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    decomposes=True,
)
_BWD = HIMO_LOSS.define(
    "bwd",
    "(Tensor grad_contrastive_loss, Tensor grad_component_loss, Tensor image_features, "
    "Tensor text_features, Tensor logit_scale, Tensor row_nll, Tensor column_nll, "
    "Tensor component_row_nll, Tensor component_column_nll, Tensor mean, Tensor eigenvalues, "
    "Tensor eigenvectors, Tensor rank, bool normalize_components, float label_smoothing, "
    "bool differentiate_keys, bool differentiate_basis, float gap_eps, bool[] needs_grad, "
    "str backend, *, Tensor? products=None, Tensor? factors=None) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)


def _room(features: Tensor, budget: float | None) -> dict[str, Tensor]:
    # Returns an empty tensor for each cache that fits the budget (in bytes) on its own.
    *batch, samples, width = features.shape
    shapes = {
        "products": (2, *batch, samples, samples),
        "factors": (*batch, (2 * samples + width) * (min(samples, width) + 1)),
    }
    caches = {name: cache_for(features, shape, budget) for name, shape in shapes.items()}
    return {name: cache for name, cache in caches.items() if cache is not None}


class HiMoLossFunction(torch.autograd.Function):
    """himo_loss: both losses and the rank.

    A plain call on a CPU has the same in C++ (csrc/himo_loss_plain.cpp).
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        backend: str,
        logits_budget: float | None,  # bytes; None: the default
        image_features: Tensor,  # [*, N, D]
        text_features: Tensor,  # [*, N, D]
        logit_scale: Tensor,  # []
        variance_threshold: Tensor,  # [] float64
    ) -> tuple[Tensor, Tensor, Tensor]:
        caches = {}
        if backend in CACHING_BACKENDS and any(ctx.needs_input_grad):
            caches = _room(image_features, logits_budget)
        inputs = (image_features, text_features, logit_scale)
        outputs = _FWD(
            *inputs,
            variance_threshold,
            settings.floor,
            settings.normalize_components,
            settings.label_smoothing,
            backend,
            **caches,
        )
        contrastive_loss, *nll, component_loss = outputs[:4]
        *decomposition, rank = outputs[6:]
        saved = (*inputs, *nll, *outputs[4:6], *decomposition, rank)
        ctx.save_for_backward(*saved, *caches.values())
        ctx.settings, ctx.backend, ctx.caches = settings, backend, tuple(caches)
        ctx.mark_non_differentiable(rank)
        return contrastive_loss, component_loss, rank

    @staticmethod
    def backward(
        ctx: Any, grad_contrastive_loss: Tensor, grad_component_loss: Tensor, grad_rank: None
    ) -> Any:
        refuse_double_backward("himo_loss")
        tensors = ctx.saved_tensors  # read once: activation checkpointing unpacks it only once
        count = len(tensors) - len(ctx.caches)
        saved, caches = tensors[:count], tensors[count:]
        needs_grad = ctx.needs_input_grad[3:6]
        grads = _BWD(
            grad_contrastive_loss,
            grad_component_loss,
            *saved,
            *ctx.settings[1:],
            list(needs_grad),
            ctx.backend,
            **dict(zip(ctx.caches, caches, strict=True)),
        )
        of_inputs = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
        return None, None, None, *of_inputs, None

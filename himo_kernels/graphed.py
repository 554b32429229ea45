"""The HiMo loss as CUDA graphs: one launch forward and one backward. Not yet run on hardware."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from himo_kernels._batch import LocalBatch, Terms, batch_of
from himo_kernels._checks import (
    check_device,
    check_shape,
    check_tensor,
    raise_type,
    raise_value,
)
from himo_kernels.pca.op import PCA_RECONSTRUCT

if TYPE_CHECKING:
    from himo_kernels.nn import HiMoLoss

OPERATOR = "HiMoLoss.make_graphed"
# Of the eigensolver that reads no value on the host; a larger side is solved by torch.linalg.eigh.
LARGEST_SIDE = 128

Graphs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class GraphedHiMoLoss:
    """A HiMoLoss for tensors of one shape and dtype; `HiMoLoss.make_graphed` returns it.

    Call backward before the next forward: the graphs have one set of buffers. Later, backward
    raises RuntimeError.
    """

    def __init__(self, loss: "HiMoLoss", graphs: Graphs, features: Tensor) -> None:
        self.loss = loss
        self._graphs = graphs
        self._features = features.new_empty(0), features.shape
        self.calls = 0

    def __call__(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
    ) -> Tensor:
        """Returns the loss [], eq. (4)."""
        contrastive, component, _ = self.terms(image_features, text_features, logit_scale)
        return self.loss.contrastive_weight * contrastive + self.loss.component_weight * component

    def terms(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
    ) -> Terms:
        """Returns both losses, without their weights, and the rank."""
        for name, value in (("image", image_features), ("text", text_features)):
            self._check(f"{name}_features", value)
        _check_scale(logit_scale, image_features)
        self.calls += 1
        *losses, rank = self._graphs(image_features, text_features, logit_scale)
        contrastive, component = _OfLastCall.apply(self, *losses)
        return Terms(contrastive, component, rank.clone())

    def fits(self, features: Tensor) -> bool:
        """Returns whether features have the shape that was captured."""
        return features.shape == self._features[1]

    def _check(self, argument: str, value: Tensor) -> None:
        like, shape = self._features
        check_tensor(OPERATOR, argument, value)
        if (value.dtype, value.device) != (like.dtype, like.device):
            expected = f"of {like.dtype} on {like.device}, as captured"
            raise_type(OPERATOR, argument, expected, f"{value.dtype} on {value.device}")
        check_shape(OPERATOR, argument, value, shape)


class _OfLastCall(torch.autograd.Function):
    """Copies of the losses, since the next call writes to their memory."""

    @staticmethod
    def forward(ctx: Any, head: GraphedHiMoLoss, *losses: Tensor) -> tuple[Tensor, ...]:
        ctx.head, ctx.call = head, head.calls
        return tuple(loss.clone() for loss in losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.call != ctx.head.calls:
            since = ctx.head.calls - ctx.call
            raise RuntimeError(
                f"{OPERATOR}: expected backward before the next forward, got {since} since then"
            )
        return None, *grads


def capture(
    loss: "HiMoLoss",
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
) -> GraphedHiMoLoss:
    """Implements HiMoLoss.make_graphed."""
    check_capture(loss, image_features, text_features, logit_scale)

    def terms(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(loss.terms(*inputs))

    # Copies, as they become the memory that the graphs read.
    inputs = (image_features, text_features, logit_scale)
    samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    make: Any = torch.cuda.make_graphed_callables
    return GraphedHiMoLoss(loss, make(terms, samples), image_features)


def check_capture(
    loss: "HiMoLoss", image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> None:
    """Raises unless a CUDA graph can hold the loss of these tensors."""
    batch = batch_of(loss, None)
    if not isinstance(batch, LocalBatch):
        raise ValueError(
            f"{OPERATOR}: expected one process, got a group: its collectives are not captured"
        )
    if loss.check_finite:
        raise_value(OPERATOR, "check_finite", "to be False, since it reads on the host", True)
    check_tensor(OPERATOR, "logit_scale", logit_scale)
    batch.check(image_features, text_features, logit_scale, lambda: None)
    _check_scale(logit_scale, image_features)
    side = min(text_features.shape[-2:])
    if side > LARGEST_SIDE:
        expected = f"to be at most {LARGEST_SIDE}, since a larger eigenproblem waits for the host"
        raise_value(OPERATOR, "min(N, D)", expected, side)
    if image_features.device.type != "cuda":
        raise_value(OPERATOR, "image_features", "on a CUDA device", str(image_features.device))
    backend = PCA_RECONSTRUCT.resolve(loss.backend, text_features)
    if backend != "triton":
        expected = "to be 'triton', whose eigensolver alone does not wait for the host"
        raise_value(OPERATOR, "backend", expected, backend)


def _check_scale(logit_scale: Tensor, features: Tensor) -> None:
    # A number would be captured as a constant, and a copy from the host cannot be captured.
    check_tensor(OPERATOR, "logit_scale", logit_scale)
    check_device(OPERATOR, "logit_scale", logit_scale, "image_features", features)

"""The sigmoid loss of the joined batch of all ranks, in which each rank owns its rows."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from himo_kernels._checks import check_alike, check_finite_values, check_flag
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import refuse_double_backward
from himo_kernels.distributed.agreement import agree, check_rows
from himo_kernels.distributed.exchange import STRATEGIES
from himo_kernels.distributed.loss import check_strategy, grad_flags, resolve_over_ranks
from himo_kernels.distributed.wire import Rows, members_of
from himo_kernels.info_nce.api import check_scalar
from himo_kernels.sigmoid_loss import api as of_one
from himo_kernels.sigmoid_loss.op import BLOCK


def sigmoid_loss(
    image_features: Tensor,  # [M, D]
    text_features: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # []
    logit_bias: Tensor | float,  # []
    *,
    group: dist.ProcessGroup | None = None,
    strategy: str = "gather",
    check_finite: bool = False,
    check_ranks: bool = True,
    backend: str = "auto",
) -> Tensor:
    """This rank's share of himo_kernels.sigmoid_loss of the joined rows of all ranks.

    The share is the sum over the pairs of this rank's M images with all N texts, times W / N. Its
    mean over the W ranks is the loss of one process on the joined batch. After DDP averages
    gradients, every parameter, including logit_scale and logit_bias, gets the gradient of that
    loss. With M rows on every rank, W / N = 1 / M and the share equals open_clip's SigLipLoss,
    which needs equal row counts.

    Other arguments are as in `himo_kernels.sigmoid_loss`, and must be equal on every rank.

    Args:
        image_features: this rank's rows [M, D]; M may differ between ranks and may be 0.
        text_features: [M, D].
        group, strategy, check_ranks: as in `info_nce`.

    Returns:
        Share of the loss [], float32, or float64 for float64 features.

    Raises:
        ValueError, TypeError, NotImplementedError: on every rank, if any rank's arguments are
            wrong, with that rank's number.
    """
    operator = "sigmoid_loss"
    members = members_of(group, operator)
    features = {"image_features": image_features, "text_features": text_features}

    def scalars() -> dict[str, Tensor]:
        given = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        return {
            name: check_scalar(operator, name, value, image_features)
            for name, value in given.items()
        }

    def check() -> None:
        check_alike(operator, features, check_rows)
        checked = scalars()
        check_strategy(operator, strategy)
        resolve_over_ranks(operator, backend, members.size, image_features, BLOCK)
        if check_flag(operator, "check_finite", check_finite):
            check_finite_values(operator, **features, **checked)

    rows = agree(
        operator,
        members,
        image_features,
        check,
        settings=(check_finite, strategy, backend),
        needs_grad=grad_flags(*features.values(), logit_scale, logit_bias),
        check_ranks=check_flag(operator, "check_ranks", check_ranks),
    )
    inputs = (*features.values(), *scalars().values())
    if members.size == 1:
        return of_one.sigmoid_loss(*inputs, backend=backend)
    chosen = resolve_over_ranks(operator, backend, members.size, image_features, BLOCK)
    return JoinedSigmoidLoss.apply(rows, strategy, chosen, *inputs)


class JoinedSigmoidLoss(torch.autograd.Function):
    """The share of the loss. Saves inputs; "gather" also caches all texts.

    The incoming gradients may differ between ranks, and a text's gradient is a sum over ranks. So
    the backward computes the logits again, unlike the loss of one process.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Rows,
        strategy: str,
        backend: str,
        image_features: Tensor,  # [M, D]
        text_features: Tensor,  # [M, D]
        logit_scale: Tensor,  # []
        logit_bias: Tensor,  # []
    ) -> Tensor:
        ctx.rows, ctx.backend = rows, backend
        ctx.exchange = STRATEGIES[strategy](rows)
        share = image_features.new_zeros((), dtype=accumulation_dtype(image_features.dtype))
        for first, texts, _ in ctx.exchange.blocks(text_features, _no_table(text_features)):
            arguments = (image_features, texts, logit_scale, logit_bias)
            loss, *_ = _block(*arguments, rows.first(rows.rank) - first, [False] * 4, backend)
            share += loss
        ctx.save_for_backward(image_features, text_features, logit_scale, logit_bias)
        return _weight(rows) * share

    @staticmethod
    def backward(ctx: Any, grad_share: Tensor) -> Any:  # []
        refuse_double_backward("sigmoid_loss")
        rows: Rows = ctx.rows
        image_features, text_features, logit_scale, logit_bias = ctx.saved_tensors
        weight = _weight(rows) * grad_share
        zeros = image_features.new_zeros
        grad_images = zeros(image_features.shape, dtype=weight.dtype)
        grad_scale, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        for first, texts, _ in ctx.exchange.blocks(text_features, _no_table(text_features)):
            arguments = (image_features, texts, logit_scale, logit_bias)
            _, to_images, to_texts, to_scale, to_bias = _block(
                *arguments, rows.first(rows.rank) - first, [True] * 4, ctx.backend
            )
            grad_images += to_images
            grad_scale += to_scale
            grad_bias += to_bias
            ctx.exchange.add(weight * to_texts)
        grad_texts = ctx.exchange.collect()
        return (
            *(None,) * 3,
            (weight * grad_images).to(image_features.dtype),
            grad_texts.to(text_features.dtype),
            (weight * grad_scale).to(logit_scale.dtype),
            (weight * grad_bias).to(logit_bias.dtype),
        )


def _block(
    image_features: Tensor,  # [M, D]
    texts: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    offset: int,
    needs_grad: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    # The sum over a block, which may have no rows or no columns, and its gradients.
    if len(image_features) == 0 or len(texts) == 0:
        dtype = accumulation_dtype(image_features.dtype)
        shapes = ((), image_features.shape, texts.shape, (), ())
        return tuple(image_features.new_zeros(shape, dtype=dtype) for shape in shapes)
    inputs = (image_features, texts, logit_scale, logit_bias, offset, needs_grad)
    return BLOCK.run("fwd", *inputs, backend)


def _no_table(features: Tensor) -> Tensor:
    # No statistics are sent with the texts.
    return features.new_empty((len(features), 0))


def _weight(rows: Rows) -> float:
    # Of a pair in its rank's share: 1 / N, times W, by which DDP's mean over ranks divides.
    return rows.members.size / rows.total

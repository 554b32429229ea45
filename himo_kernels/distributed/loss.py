"""InfoNCE of the joined batch of all ranks, in which each rank owns its rows.

README.md derives the exchange, and why gradients averaged by DDP equal one process's gradients.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from himo_kernels._checks import (
    check_alike,
    check_choice,
    check_finite_values,
    check_flag,
    check_integers,
    check_label_smoothing,
    check_shape,
    raise_value,
)
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import Operator, check_backend, refuse_double_backward
from himo_kernels.distributed.agreement import agree, check_rows
from himo_kernels.distributed.exchange import STRATEGIES
from himo_kernels.distributed.labels import labelled_losses
from himo_kernels.distributed.wire import Rows, members_of
from himo_kernels.info_nce import api as of_one
from himo_kernels.info_nce.block import BLOCK, block_bwd, block_fwd
from himo_kernels.info_nce.compose import Direction, Settings
from himo_kernels.info_nce.pairs.form import DIRECTIONS, SAME_LABEL
from himo_kernels.info_nce.pairs.op import INFO_NCE_PAIRS


class Options(NamedTuple):
    """The arguments that are the same on every rank."""

    label_smoothing: float
    differentiate_keys: bool
    strategy: str
    backend: str
    directions: str = "both"
    same_label: str = "positive"


def info_nce(
    image_features: Tensor,  # [M, D]
    text_features: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # []
    *,
    group: dist.ProcessGroup | None = None,
    strategy: str = "gather",
    directions: str = "both",
    labels: Tensor | None = None,  # [M]
    same_label: str = "positive",
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
    check_finite: bool = False,
    check_ranks: bool = True,
    backend: str = "auto",
) -> Tensor:
    """This rank's share of himo_kernels.info_nce of the joined rows of all ranks.

    The share is the loss of this rank's M of the N images and texts times W / N. Its mean over the
    W ranks is the loss of one process on the joined batch. After DDP averages gradients, every
    parameter, including logit_scale, gets the gradient of that loss.

    Other arguments are as in `himo_kernels.info_nce`, and must be equal on every rank.

    Args:
        image_features: this rank's rows [M, D]; M may differ between ranks and may be 0.
        text_features: [M, D].
        group: the ranks; None is all of them, or this process alone without a process group.
        strategy: "gather" holds the keys of all ranks, "ring" the keys of two ranks at a time. With
            labels only "gather".
        labels: int64 or int32 [M], one tensor for the images and the texts; of every rank or of
            none. They are compared over all ranks.
        check_ranks: as in `HiMoLoss`.

    Returns:
        Share of the loss [], float32, or float64 for float64 features.

    Raises:
        ValueError, TypeError, NotImplementedError: on every rank, if any rank's arguments are
            wrong, with that rank's number.
    """
    options = Options(
        label_smoothing, differentiate_keys, strategy, backend, directions, same_label
    )
    checks = (check_finite, check_ranks)
    keys = {"text": text_features}
    (loss,) = _public(
        "info_nce", group, logit_scale, options, checks, image_features, labels, **keys
    )
    return loss


def dual_info_nce(
    image_features: Tensor,  # [M, D]
    text_features: Tensor,  # [M, D]
    component_features: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # []
    *,
    group: dist.ProcessGroup | None = None,
    strategy: str = "gather",
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
    check_finite: bool = False,
    check_ranks: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """This rank's shares of himo_kernels.dual_info_nce; texts and components are sent together.

    Arguments and errors as in `info_nce`, without directions and labels.

    Returns:
        Shares of the global loss [] and of the component loss [].
    """
    options = Options(label_smoothing, differentiate_keys, strategy, backend)
    checks = (check_finite, check_ranks)
    keys = {"text": text_features, "component": component_features}
    global_loss, component_loss = _public(
        "dual_info_nce", group, logit_scale, options, checks, image_features, None, **keys
    )
    return global_loss, component_loss


def _public(
    operator: str,
    group: dist.ProcessGroup | None,
    logit_scale: Tensor | float,
    options: Options,
    checks: tuple[bool, bool],  # check_finite and check_ranks
    image_features: Tensor,
    labels: Tensor | None,
    **keys: Tensor,
) -> tuple[Tensor, ...]:
    check_finite, check_ranks = checks
    members = members_of(group, operator)
    features = {"image_features": image_features}
    features |= {f"{name}_features": value for name, value in keys.items()}

    def check() -> None:
        check_alike(operator, features, check_rows)
        scale = of_one.check_logit_scale(operator, logit_scale, image_features)
        check_choice(operator, "directions", options.directions, DIRECTIONS)
        check_choice(operator, "same_label", options.same_label, SAME_LABEL)
        check_label_smoothing(operator, options.label_smoothing)
        check_flag(operator, "differentiate_keys", options.differentiate_keys)
        check_strategy(operator, options.strategy)
        check_labels(operator, labels, options.strategy, members.size, image_features)
        block = block_for(labels)
        resolve_over_ranks(operator, options.backend, members.size, image_features, block)
        if check_flag(operator, "check_finite", check_finite):
            check_finite_values(operator, **features, logit_scale=scale)

    rows = agree(
        operator,
        members,
        image_features,
        check,
        settings=(options, check_finite, labels is None),
        needs_grad=grad_flags(*features.values(), logit_scale),
        check_ranks=check_flag(operator, "check_ranks", check_ranks),
    )
    return losses(
        rows,
        options,
        image_features,
        tuple(keys.values()),
        of_one.check_logit_scale(operator, logit_scale, image_features),
        None if labels is None else rows.all_gather(labels.long()),
    )


def losses(
    rows: Rows,
    options: Options,
    image_features: Tensor,  # [M, D]
    keys: tuple[Tensor, ...],  # texts, or texts and components, [M, D] each
    logit_scale: Tensor,  # []
    labels: Tensor | None = None,  # [N] int64, of all ranks
) -> tuple[Tensor, ...]:
    """Shares of the losses, for arguments that all ranks agreed on."""
    size = rows.members.size
    if size > 1 and labels is not None:
        return labelled_losses(rows, options, image_features, keys, logit_scale, labels)
    if size > 1:
        options = options._replace(
            label_smoothing=float(options.label_smoothing),
            backend=resolve_over_ranks("info_nce", options.backend, size, image_features),
        )
        return JoinedLoss.apply(rows, options, image_features, logit_scale, *keys)
    settings: dict[str, Any] = {
        "label_smoothing": options.label_smoothing,
        "differentiate_keys": options.differentiate_keys,
        "backend": options.backend,
    }
    if len(keys) == 2 and labels is None:
        return of_one.dual_info_nce(image_features, *keys, logit_scale, **settings)
    settings |= {
        "directions": options.directions,
        "labels": labels,
        "same_label": options.same_label,
    }
    return tuple(of_one.info_nce(image_features, key, logit_scale, **settings) for key in keys)


class JoinedLoss(torch.autograd.Function):
    """Shares of the losses. Saves inputs and nlls [M]; "gather" also caches all keys."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Rows,
        options: Options,  # with a backend of BLOCK
        image_features: Tensor,  # [M, D]
        logit_scale: Tensor,  # []
        *keys: Tensor,  # [M, D] each
    ) -> tuple[Tensor, ...]:
        smoothing, backend = options.label_smoothing, options.backend
        dtype = accumulation_dtype(image_features.dtype)
        scale, features = logit_scale.to(dtype), image_features.shape[1]
        wide = image_features.to(dtype)
        # [M, K], K losses; all tables with one row per sample have this shape.
        positives = scale * torch.stack([(wide * key.to(dtype)).sum(1) for key in keys], 1)
        ctx.exchange = STRATEGIES[options.strategy](rows)
        # [..., 0]: log sum exp without the positive. [..., 1]: the sum of all logits, not formed:
        # the sum over i of s v_i . k_j is s (sum_i v_i) . k_j.
        own_stats = scale.new_zeros(rows.own, len(keys), 2)
        own_stats[..., 0] = -torch.inf
        key_stats = scale.new_zeros(rows.total, len(keys), 2)
        for first, block, table in ctx.exchange.blocks(torch.cat(keys, 1), positives):
            offset = rows.first(rows.rank) - first
            for k, key in enumerate(block.split(features, 1)):
                of_rows, of_keys = block_fwd(
                    image_features, key, scale, positives[:, k], table[:, k], offset, backend
                )
                own_stats[:, k, 0] = torch.logaddexp(own_stats[:, k, 0], of_rows)
                columns = key_stats[first : first + len(key), k]
                columns[:, 0] = of_keys
                if smoothing:
                    wide_key = key.to(dtype)
                    own_stats[:, k, 1] += scale * (wide @ wide_key.sum(0))
                    columns[:, 1] = scale * (wide_key @ wide.sum(0))
        received = rows.exchange(key_stats)  # [W, M, K, 2], every rank's part for own keys
        zero = torch.zeros_like(positives)
        row_nll = torch.logaddexp(own_stats[..., 0], zero)
        column_nll = torch.logaddexp(torch.logsumexp(received[..., 0], 0), zero)
        directions = ((row_nll, own_stats[..., 1]), (column_nll, received[..., 1].sum(0)))
        shares = scale.new_zeros(len(keys))
        for weight, (nll, total) in zip(_weights(rows, options), directions, strict=True):
            if weight:  # info_nce/README.md (5) for own rows, or own columns
                shares += weight * (nll + smoothing * (positives - total / rows.total)).sum(0)
        ctx.save_for_backward(image_features, logit_scale, *keys, positives, row_nll, column_nll)
        ctx.rows, ctx.options = rows, options
        return tuple(share.clone() for share in shares)

    @staticmethod
    def backward(ctx: Any, *grad_shares: Tensor) -> Any:
        refuse_double_backward("info_nce")
        rows: Rows = ctx.rows
        options: Options = ctx.options
        image_features, logit_scale, *keys, positives, row_nll, column_nll = ctx.saved_tensors
        scale, features = logit_scale.to(positives.dtype), image_features.shape[1]
        # Incoming gradients may differ between ranks, so they are sent with the keys.
        row_weights, column_weights = (
            (weight * torch.stack(grad_shares)).expand_as(positives)
            for weight in _weights(rows, options)
        )
        table = torch.cat([positives, column_nll, column_weights], 1)
        grad_image = scale.new_zeros(image_features.shape)
        for first, block, block_table in ctx.exchange.blocks(torch.cat(keys, 1), table):
            offset = rows.first(rows.rank) - first
            of_keys = block_table.unflatten(1, (3, len(keys)))  # positives, nlls, weights
            grads = []
            for k, key in enumerate(block.split(features, 1)):
                to_images, to_keys = block_bwd(
                    image_features,
                    key,
                    scale,
                    Direction(positives[:, k], row_nll[:, k], row_weights[:, k]),
                    Direction(*of_keys[:, :, k].unbind(1)),
                    offset,
                    Settings(options.label_smoothing, options.differentiate_keys),
                    rows.total,
                    options.backend,
                )
                grad_image += to_images
                grads.append(to_keys)
            ctx.exchange.add(torch.cat(grads, 1))
        grad_keys = ctx.exchange.collect()  # [M, K D]
        grad_scale = (image_features * grad_image).sum()
        if not options.differentiate_keys:  # grad_image then has the row direction only
            grad_scale = grad_scale + (torch.cat(keys, 1) * grad_keys).sum()
        return (
            *(None,) * 2,
            (scale * grad_image).to(image_features.dtype),
            grad_scale.to(logit_scale.dtype),
            *((scale * grad).to(image_features.dtype) for grad in grad_keys.split(features, 1)),
        )


def _weights(rows: Rows, options: Options) -> tuple[float, float]:
    # Of an image and of a text in their rank's share: the mean over N of them and over the
    # directions, times W, by which DDP's mean over ranks divides.
    mean = rows.members.size / rows.total
    return {"both": (mean / 2, mean / 2), "rows": (mean, 0.0), "columns": (0.0, mean)}[
        options.directions
    ]


def check_labels(
    operator: str, labels: Tensor | None, strategy: str, size: int, image_features: Tensor
) -> None:
    """Raises unless labels are None or integers, one of each row, and the strategy takes them."""
    if labels is None:
        return
    check_integers(operator, "labels", labels, image_features)
    check_shape(operator, "labels", labels, image_features.shape[-2:-1])
    if size > 1 and strategy != "gather":
        raise_value(operator, "strategy", "to be 'gather' with labels", strategy)


def check_strategy(operator: str, strategy: object) -> None:
    """Raises unless strategy is the name of one."""
    check_choice(operator, "strategy", strategy, list(STRATEGIES))


def block_for(labels: Tensor | None) -> Operator:
    """Returns the operator that computes a rank's part of the loss."""
    return BLOCK if labels is None else INFO_NCE_PAIRS


def resolve_over_ranks(
    operator: str, backend: str, size: int, image_features: Tensor, block: Operator = BLOCK
) -> str:
    """Returns the backend for blocks over several ranks; raises if none can run them."""
    check_backend(operator, backend)
    return backend if size == 1 else block.resolve(backend, image_features)


def grad_flags(*inputs: object) -> tuple[bool, ...]:
    """Which inputs need a gradient: equal on every rank, or some ranks would wait forever."""
    enabled = torch.is_grad_enabled()
    return tuple(isinstance(x, Tensor) and x.requires_grad and enabled for x in inputs)

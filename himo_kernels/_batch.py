"""The batch of a HiMoLoss: the rows of one process, or the joined rows of all ranks.

Both classes have the same methods, so HiMoLoss has one code path for one process and for many.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from himo_kernels._checks import (
    check_features,
    check_finite_values,
    check_same_as,
    check_shape,
)
from himo_kernels.distributed import loss as loss_over_ranks
from himo_kernels.distributed import moments
from himo_kernels.distributed.agreement import agree, check_rows
from himo_kernels.distributed.wire import Rows, members_of
from himo_kernels.himo_loss import HiMoTerms, himo_loss
from himo_kernels.himo_loss.api import plain_terms
from himo_kernels.himo_loss.op import HIMO_LOSS
from himo_kernels.info_nce import dual_info_nce, info_nce
from himo_kernels.info_nce.api import check_logit_scale
from himo_kernels.info_nce.op import DUAL_INFO_NCE
from himo_kernels.normalize import normalize
from himo_kernels.pca.api import reconstruct_above
from himo_kernels.pca.reference import floor_of

if TYPE_CHECKING:
    from himo_kernels.nn import HiMoLoss


class Terms(NamedTuple):
    """The terms of HiMo-CLIP eq. (4), and the rank of the PCA."""

    contrastive_loss: Tensor  # [], eq. (2), before its weight
    component_loss: Tensor  # [], eq. (3), before its weight
    rank: Tensor  # [] int64, of the PCA, on the device


def batch_of(loss: "HiMoLoss", labels: Tensor | None) -> "LocalBatch | JoinedBatch":
    """Returns the batch for a call of this loss: local if its group has one process."""
    group = loss.group
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return LocalBatch(loss, labels)
    alone = dist.get_world_size(group) == 1  # -1 on a rank that is no member, which is an error
    return LocalBatch(loss, labels) if alone else JoinedBatch(loss, labels)


class Batch:
    """The interface of both batches, and the composition of the three operators."""

    def __init__(self, loss: "HiMoLoss", labels: Tensor | None) -> None:
        self.loss = loss
        # [N]; pairs of equal labels are not each other's negatives. Over ranks, check joins them.
        self.labels = labels

    def plain_terms(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
    ) -> HiMoTerms | None:
        """Returns the terms if the call is plain (Operator.plain); then nothing else is needed."""
        return None

    def terms(
        self,
        images: Tensor,  # [N, D], normalised where the loss does that, as texts
        text_features: Tensor,  # [N, D]
        texts: Tensor,  # [N, D]
        logit_scale: Tensor | float,
    ) -> tuple[Tensor, ...]:
        """Returns the contrastive loss, the component loss and the rank: eq. (1) to (3)."""
        components, rank = self.reconstruct(text_features, texts)
        if self.loss.normalize_components:
            components = self.normalize(components)
        return *self.losses(images, texts, components, logit_scale), rank

    def terms_of_both(
        self,
        features: tuple[Tensor, Tensor],  # of images and texts, [N, D] each, as given
        images: Tensor,  # [N, D], normalised where the loss does that, as texts
        texts: Tensor,  # [N, D]
        logit_scale: Tensor | float,
    ) -> tuple[Tensor, ...]:
        """Returns `terms` with the component loss of both reconstructions: table 5's L_comp^{u,v}.

        The rank returned is the texts' rank.
        """
        pairs = zip(features, (images, texts), strict=True)
        (image_components, _), (components, rank) = [self.reconstruct(*pair) for pair in pairs]
        if self.loss.normalize_components:
            image_components = self.normalize(image_components)
            components = self.normalize(components)
        contrastive = self.one_loss(images, texts, logit_scale)
        component = self.one_loss(
            image_components.to(texts.dtype), components.to(texts.dtype), logit_scale
        )
        return contrastive, component, rank

    def normalize(self, features: Tensor) -> Tensor:  # [N, D] -> [N, D]
        """Returns rows of length 1."""
        raise NotImplementedError

    def reconstruct(self, text_features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the component features [N, D] and the rank []: eq. (1)."""
        raise NotImplementedError

    def one_loss(self, images: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Returns the InfoNCE loss of images and texts [N, D], both directions: eq. (2)."""
        raise NotImplementedError

    def losses(
        self, images: Tensor, texts: Tensor, components: Tensor, logit_scale: Tensor | float
    ) -> tuple[Tensor, ...]:
        """Returns the contrastive and the component loss: eq. (2) and (3)."""
        raise NotImplementedError


class LocalBatch(Batch):
    """The rows of one process."""

    def plain_terms(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
    ) -> HiMoTerms | None:
        """Returns the terms if the call is plain (Operator.plain); then nothing else is needed."""
        loss, hide = self.loss, self.loss.hide
        if self.labels is not None or loss.decompose_images:
            return None
        options = (
            *(hide.variance_threshold, hide.variance_floor, loss.normalize_components),
            *(loss.label_smoothing, loss.gather_with_grad),
            *(hide.differentiate_basis, hide.gap_eps),
        )
        features, normalizes = (image_features, text_features), loss.normalize_features
        return plain_terms(
            features, logit_scale, normalizes, options, loss.check_finite, loss.backend
        )

    def check(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        check_others: Callable[[], object],
    ) -> None:
        """Raises if an argument is wrong; check_others checks the caller's other arguments."""
        _check_arguments(self.loss, check_features, image_features, text_features, logit_scale)
        loss_over_ranks.check_labels("HiMoLoss", self.labels, self.loss.strategy, 1, image_features)
        check_others()

    def terms(
        self,
        images: Tensor,  # [N, D], normalised where the loss does that, as texts
        text_features: Tensor,  # [N, D]
        texts: Tensor,  # [N, D]
        logit_scale: Tensor | float,
    ) -> tuple[Tensor, ...]:
        """Returns the contrastive loss, the component loss and the rank: eq. (1) to (3).

        Calls himo_loss, which has no labels, if it has the backend that dual_info_nce would use.
        """
        loss, hide = self.loss, self.loss.hide
        head = HIMO_LOSS.choose(loss.backend, images)
        other = DUAL_INFO_NCE.choose(loss.backend, images)
        if self.labels is not None or head is None or head != other:
            return super().terms(images, text_features, texts, logit_scale)
        return himo_loss(
            images,
            texts,
            logit_scale,
            variance_threshold=hide.variance_threshold,
            variance_floor=hide.variance_floor,
            normalize_components=loss.normalize_components,
            label_smoothing=loss.label_smoothing,
            differentiate_keys=loss.gather_with_grad,
            differentiate_basis=hide.differentiate_basis,
            gap_eps=hide.gap_eps,
            check_finite=loss.check_finite,
            backend=head,
        )

    def normalize(self, features: Tensor) -> Tensor:  # [N, D] -> [N, D]
        """Returns rows of length 1."""
        return normalize(features, backend=self.loss.backend)

    def reconstruct(self, text_features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the component features [N, D] and the rank []: eq. (1).

        texts are the text_features, normalised if the loss normalises them.
        """
        return self.loss.hide(texts)

    def one_loss(self, images: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Returns the InfoNCE loss of images and texts [N, D], both directions: eq. (2)."""
        settings = self._settings()
        if self.labels is not None:
            settings |= {"labels": self.labels, "same_label": "exclude"}
        return info_nce(images, texts, logit_scale, **settings)

    def losses(
        self,
        images: Tensor,  # [N, D]
        texts: Tensor,  # [N, D]
        components: Tensor,  # [N, D]
        logit_scale: Tensor | float,
    ) -> tuple[Tensor, ...]:
        """Returns the contrastive and the component loss: eq. (2) and (3)."""
        if self.labels is None:
            return dual_info_nce(images, texts, components, logit_scale, **self._settings())
        return tuple(self.one_loss(images, keys, logit_scale) for keys in (texts, components))

    def _settings(self) -> dict[str, Any]:
        loss = self.loss
        return {
            "label_smoothing": loss.label_smoothing,
            "differentiate_keys": loss.gather_with_grad,
            "check_finite": loss.check_finite,
            "backend": loss.backend,
        }


class JoinedBatch(Batch):
    """The rows of all ranks of a group. This rank has M of them; M may be 0.

    Call check first: it exchanges the row counts that the other methods need.
    """

    rows: Rows

    def check(
        self,
        image_features: Tensor,  # [M, D]
        text_features: Tensor,  # [M, D]
        logit_scale: Tensor | float,
        check_others: Callable[[], object],
    ) -> None:
        """Raises on every rank if an argument of any rank is wrong or the ranks differ."""
        loss = self.loss
        members, labels = members_of(loss.group, "HiMoLoss"), self.labels

        def check() -> None:
            _check_arguments(loss, check_rows, image_features, text_features, logit_scale)
            loss_over_ranks.check_labels(
                "HiMoLoss", labels, loss.strategy, members.size, image_features
            )
            check_others()
            block = loss_over_ranks.block_for(labels)
            loss_over_ranks.resolve_over_ranks(
                "HiMoLoss", loss.backend, members.size, image_features, block
            )

        self.rows = agree(
            "HiMoLoss",
            members,
            image_features,
            check,
            settings=(
                loss.extra_repr(),
                loss.hide.extra_repr(),
                loss.backend,
                loss.strategy,
                labels is None,
            ),
            needs_grad=loss_over_ranks.grad_flags(image_features, text_features, logit_scale),
            check_ranks=loss.check_ranks,
        )
        # Of all ranks [N]: both losses compare them.
        self.labels = None if labels is None else self.rows.all_gather(labels.long())

    def normalize(self, features: Tensor) -> Tensor:  # [M, D] -> [M, D]
        """Returns rows of length 1. A rank may have no rows."""
        if self.rows.own == 0:
            return features
        return normalize(features, backend=self.loss.backend)

    def reconstruct(self, text_features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns this rank's component features [M, D] in float64, and the rank []: eq. (1).

        The PCA gets float64 texts. With rounded texts and a narrow gap at the cut, the gradient
        would differ by more than 1e-6 from the gradient of one process on the joined batch.
        """
        loss, hide = self.loss, self.loss.hide
        wide = text_features.double()
        if loss.normalize_features:
            wide = self.normalize(wide)
        # The floor must exceed the rounding of the caller's features, so it uses their dtype.
        floor = floor_of(texts.dtype, hide.variance_floor)
        settings = (hide.variance_threshold, hide.gap_eps, hide.differentiate_basis, loss.backend)
        if loss.pca_scope == "global":
            return moments.reconstruct(floor, wide, self.rows, *settings)
        if self.rows.own == 0:
            return wide, torch.zeros((), dtype=torch.int64, device=wide.device)
        return reconstruct_above(floor, wide, *settings)

    def losses(
        self,
        images: Tensor,  # [M, D]
        texts: Tensor,  # [M, D]
        components: Tensor,  # [M, D] float64
        logit_scale: Tensor | float,
    ) -> tuple[Tensor, ...]:
        """Returns this rank's shares of the contrastive and the component loss: eq. (2) and (3)."""
        return self._shares(images, (texts, components.to(texts.dtype)), logit_scale)

    def one_loss(self, images: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Returns this rank's share of the InfoNCE loss of images and texts [M, D]: eq. (2)."""
        (share,) = self._shares(images, (texts,), logit_scale)
        return share

    def _shares(
        self, images: Tensor, keys: tuple[Tensor, ...], logit_scale: Tensor | float
    ) -> tuple[Tensor, ...]:
        loss = self.loss
        return loss_over_ranks.losses(
            self.rows,
            loss_over_ranks.Options(
                loss.label_smoothing,
                loss.gather_with_grad,
                loss.strategy,
                loss.backend,
                same_label="exclude",
            ),
            images,
            keys,
            check_logit_scale("HiMoLoss", logit_scale, images),
            self.labels,
        )


def _check_arguments(
    loss: "HiMoLoss",
    check_each: Callable[[str, str, Tensor], None],
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
) -> None:
    for argument, value in (("image_features", image_features), ("text_features", text_features)):
        check_each("HiMoLoss", argument, value)
        check_same_as("HiMoLoss", argument, value, "image_features", image_features)
        check_shape("HiMoLoss", argument, value, image_features.shape)
        if loss.check_finite:
            check_finite_values("HiMoLoss", **{argument: value})
            if loss.normalize_features:
                _check_directions(argument, value)
    check_logit_scale("HiMoLoss", logit_scale, image_features)


def _check_directions(argument: str, features: Tensor) -> None:
    zero = (features.detach() == 0).all(-1)
    if zero.any():
        row = [int(index) for index in zero.nonzero()[0]]
        raise ValueError(f"HiMoLoss: expected {argument} without rows of zeros, got one at {row}")

"""Modules: HiDe's decomposition, and the HiMo loss with open_clip's ClipLoss signature."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch.distributed as dist
from torch import Tensor, nn

from himo_kernels._batch import Terms, batch_of
from himo_kernels._checks import (
    check_choice,
    check_flag,
    check_gap_eps,
    check_label_smoothing,
    check_number,
    check_variance_floor,
    check_variance_threshold,
    raise_value,
)
from himo_kernels.dispatch import check_backend
from himo_kernels.distributed.loss import check_strategy
from himo_kernels.graphed import GraphedHiMoLoss, capture
from himo_kernels.info_nce.api import bias_and_flag, with_logit_bias
from himo_kernels.pca import pca_reconstruct
from himo_kernels.presets import PRESETS

__all__ = ["PRESETS", "HiDe", "HiMoLoss", "Terms"]


class HiDe(nn.Module):
    """In-batch PCA reconstruction of text features: HiMo-CLIP section 3.2, eq. (1).

    Args:
        variance_threshold: tau in (0, 1], the share of the batch's variance to keep.
        variance_floor, gap_eps, differentiate_basis, check_finite, backend: as in
            `pca_reconstruct`.
    """

    def __init__(
        self,
        variance_threshold: float = 0.9,
        *,
        variance_floor: float | str = "relative",
        gap_eps: float = 1e-6,
        differentiate_basis: bool = True,
        check_finite: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.variance_threshold = check_variance_threshold("HiDe", variance_threshold)
        self.variance_floor = check_variance_floor("HiDe", variance_floor)
        self.gap_eps = check_gap_eps("HiDe", gap_eps)
        self.differentiate_basis = check_flag("HiDe", "differentiate_basis", differentiate_basis)
        self.check_finite = check_flag("HiDe", "check_finite", check_finite)
        self.backend = check_backend("HiDe", backend)

    def forward(self, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the component features [*, N, D] and the rank [*] (int64, on the device)."""
        return pca_reconstruct(
            text_features,
            self.variance_threshold,
            variance_floor=self.variance_floor,
            gap_eps=self.gap_eps,
            differentiate_basis=self.differentiate_basis,
            check_finite=self.check_finite,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Returns the settings shown by print(module)."""
        names = ("variance_threshold", "variance_floor", "gap_eps", "differentiate_basis")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class HiMoLoss(nn.Module):
    """MoLo: InfoNCE(image, text) + weight * InfoNCE(image, component), HiMo-CLIP eq. (4).

    A preset sets every switch; an explicit argument overrides it. `paper` is the published method,
    `official` is the released code. The variants of the paper's table 5 are component_weight=0,
    contrastive_weight=0 and decompose_images=True.

    Over several processes each rank passes its own rows and gets its share of the loss. The mean of
    the shares over ranks is the loss of one process on the joined batch. After DDP averages
    gradients, every parameter, including logit_scale, gets the gradient of that loss. With
    pca_scope="local", the components come from each rank's own rows. Row counts may differ between
    ranks. If any rank's arguments are wrong, every rank raises the same error.
    himo_kernels/distributed/README.md has the derivation and the cost.

    Args:
        preset: "paper" or "official".
        variance_threshold: tau of the in-batch PCA, in (0, 1]. paper 0.9, official 0.85.
        variance_floor: As in `pca_reconstruct`. paper "relative", official 1e-8.
        contrastive_weight: Weight of the first loss, >= 0. Both 1.
        component_weight: lambda, >= 0. Both 1.
        label_smoothing: eps in [0, 1]. paper 0, official 0.1.
        normalize_features: L2-normalise image and text features first (changes normalised
            ones only by rounding). Both True.
        normalize_components: L2-normalise the reconstructed texts. paper True, official False.
        decompose_images: Reconstruct the images too, each side from its own PCA. The component loss
            then compares both reconstructions, and normalize_components applies to both. Both
            False.
        pca_scope: PCA over the "global" batch (paper) or each rank's "local" batch (official).
            Equal in one process.
        gather_with_grad: True (paper) differentiates both sides of each direction; False
            (official) treats the keys, the gathered side, as constants.
        differentiate_basis: Gradient through the PCA basis. Both True.
        gap_eps: Relative floor of the eigenvalue gap in the PCA's backward; see `pca_reconstruct`.
        check_finite: Raise on NaN, inf and, if features are normalised, a row of zeros (host sync).
        backend: As in every operator; used for all of them.
        group: The ranks that share a batch; None is all of them, if there is a process group.
        strategy: How a rank gets the others' texts: "gather", or "ring" in O(N D / W) memory.
        check_ranks: False skips the check before each step that all ranks agree, and its host sync.
            Every rank must then have the same number of rows and the same settings.
    """

    def __init__(
        self,
        preset: str = "paper",
        *,
        variance_threshold: float | None = None,
        variance_floor: float | str | None = None,
        contrastive_weight: float | None = None,
        component_weight: float | None = None,
        label_smoothing: float | None = None,
        normalize_features: bool | None = None,
        normalize_components: bool | None = None,
        decompose_images: bool | None = None,
        pca_scope: str | None = None,
        gather_with_grad: bool | None = None,
        differentiate_basis: bool | None = None,
        gap_eps: float = 1e-6,
        check_finite: bool = False,
        backend: str = "auto",
        group: dist.ProcessGroup | None = None,
        strategy: str = "gather",
        check_ranks: bool = True,
    ) -> None:
        super().__init__()
        self.preset = check_choice("HiMoLoss", "preset", preset, list(PRESETS))
        defaults = PRESETS[preset]

        def choose(name: str, given: Any) -> Any:
            return defaults[name] if given is None else given

        def flag(name: str, given: bool | None) -> bool:
            return check_flag("HiMoLoss", name, choose(name, given))

        def weight(name: str, given: float | None) -> float:
            number = check_number("HiMoLoss", name, choose(name, given))
            if not 0.0 <= number < float("inf"):
                raise_value("HiMoLoss", name, "to be finite and >= 0", number)
            return number

        self.contrastive_weight = weight("contrastive_weight", contrastive_weight)
        self.component_weight = weight("component_weight", component_weight)
        self.label_smoothing = check_label_smoothing(
            "HiMoLoss", choose("label_smoothing", label_smoothing)
        )
        self.normalize_features = flag("normalize_features", normalize_features)
        self.normalize_components = flag("normalize_components", normalize_components)
        self.decompose_images = flag("decompose_images", decompose_images)
        self.pca_scope = check_choice(
            "HiMoLoss", "pca_scope", choose("pca_scope", pca_scope), ("global", "local")
        )
        self.gather_with_grad = flag("gather_with_grad", gather_with_grad)
        self.check_finite = check_flag("HiMoLoss", "check_finite", check_finite)
        self.backend = check_backend("HiMoLoss", backend)
        self.hide = HiDe(
            choose("variance_threshold", variance_threshold),
            variance_floor=choose("variance_floor", variance_floor),
            gap_eps=gap_eps,
            differentiate_basis=flag("differentiate_basis", differentiate_basis),
            check_finite=check_finite,
            backend=backend,
        )
        self.group = group
        check_strategy("HiMoLoss", strategy)
        self.strategy = strategy
        self.check_ranks = check_flag("HiMoLoss", "check_ranks", check_ranks)

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: Literal[False] = False,
        *,
        labels: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        output_dict: Literal[True],
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,  # []
        logit_bias: Tensor | float | None = None,  # []
        output_dict: bool = False,
        *,
        labels: Tensor | None = None,  # [N]
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss [], eq. (4), or the terms that add up to it.

        Args:
            image_features: [N, D], float16, bfloat16, float32 or float64.
            text_features: [N, D], row i the caption of image i.
            logit_scale: The multiplier itself, logit_scale.exp() of the model, as in open_clip.
            logit_bias: As in open_clip, a tensor of one element or a number. It is added to all
                logits, which does not change the softmax: its gradient is 0.
            output_dict: Return {"contrastive_loss": its weight times eq. (2), "component_loss": its
                weight times eq. (3)}. open_clip's trainer minimises the sum of the values. In older
                versions of open_clip it was the fourth argument; True or False there is still
                accepted.
            labels: int64 or int32. An image and a text with equal labels are not negatives of each
                other, in both terms; use this if captions repeat in a batch. Over several processes
                every rank passes the labels of its rows, or no rank passes any. Labels are compared
                over all ranks, and the strategy must be "gather".
        """

        def check() -> tuple[Tensor | float | None, bool]:
            return bias_and_flag("HiMoLoss", logit_bias, output_dict)

        terms = self._terms(image_features, text_features, logit_scale, labels, check)
        bias, as_dict = check()
        contrastive_loss = with_logit_bias(terms.contrastive_loss, bias)
        parts = {
            "contrastive_loss": _weighted(self.contrastive_weight, contrastive_loss),
            "component_loss": _weighted(self.component_weight, terms.component_loss),
        }
        # HiMo-CLIP eq. (4)
        return parts if as_dict else parts["contrastive_loss"] + parts["component_loss"]

    def terms(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,  # []
        *,
        labels: Tensor | None = None,  # [N]
    ) -> Terms:
        """Returns both losses, without their weights, and the rank, for logging."""
        return self._terms(image_features, text_features, logit_scale, labels, lambda: None)

    def make_graphed(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
    ) -> GraphedHiMoLoss:
        """Returns this loss, captured as CUDA graphs for these shapes. Not yet run on hardware.

        Call the result like this loss, or call its `terms`; it takes no bias, labels or
        output_dict. Its forward is one launch, and so is its backward. Call backward before the
        next forward. It needs backend="triton", min(N, D) <= 128, one process and
        check_finite=False.

        Args:
            image_features: [N, D] on a CUDA device; it requires a gradient if later inputs do.
            text_features, logit_scale: likewise; the scale is a tensor.

        Raises:
            ValueError, TypeError, NotImplementedError: these tensors or settings cannot be
                captured, with the reason.
        """
        return capture(self, image_features, text_features, logit_scale)

    def _terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        labels: Tensor | None,
        check_others: Callable[[], object],
    ) -> Terms:
        batch = batch_of(self, labels)
        if terms := batch.plain_terms(image_features, text_features, logit_scale):
            return Terms(*terms)
        batch.check(image_features, text_features, logit_scale, check_others)
        images, texts = image_features, text_features
        if self.normalize_features:
            images, texts = batch.normalize(images), batch.normalize(texts)
        if self.decompose_images:
            raw = image_features, text_features
            return Terms(*batch.terms_of_both(raw, images, texts, logit_scale))
        # HiMo-CLIP eq. (1) to (3)
        return Terms(*batch.terms(images, text_features, texts, logit_scale))

    def extra_repr(self) -> str:
        """Returns the settings shown by print(module)."""
        # The submodule shows the rest, including tau.
        names = ("preset", *(name for name in PRESETS[self.preset] if not hasattr(self.hide, name)))
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _weighted(weight: float, loss: Tensor) -> Tensor:
    # Without products by 1 a step of 128 pairs takes 2 % less time.
    return loss if weight == 1.0 else weight * loss

"""The objective of `himo train`: the towers, and the loss of their features over all ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from himo.accumulate import cached_backward
from himo.config import TrainConfig
from himo.errors import HimoError
from himo.model import HiMoCLIP
from himo.parallel import Ranks
from himo.precision import AUTOCAST
from himo.transforms import normalize
from himo_kernels import distributed
from himo_kernels.graphed import GraphedHiMoLoss
from himo_kernels.nn import HiMoLoss

# Below, components tell few captions apart; above this share of a batch, they are nearly the texts.
LEAST_RANK, MOST_RANK_SHARE = 8, 0.5


class Towers(nn.Module):
    """Computes the features and the logit scale from images and tokens."""

    def __init__(self, model: HiMoCLIP, precision: str, channels_last: bool = False) -> None:
        super().__init__()
        self.model, self.precision, self.channels_last = model, precision, channels_last

    def forward(
        self,
        images: Tensor,  # uint8 [B, 3, R, R]
        tokens: Tensor,  # [B, L]
        max_length: int | None,
        lengths: list[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns image and text features [B, D] and the logit multiplier [], in float32."""
        half = AUTOCAST.get(self.precision)
        if self.channels_last:  # while they are bytes; the convolution follows its input
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, half, enabled=half is not None):
            config = self.model.config
            pixels = normalize(images, config.image_mean, config.image_std)
            image_features = self.model.encode_image(pixels)
            text_features = self.model.encode_text(tokens, max_length, lengths=lengths)
        # The loss needs float32: half-precision logits near 100 are 0.06 or more apart.
        scale = self.model.logit_scale.reshape(()).float().exp()  # [1] with --fsdp
        return image_features.float(), text_features.float(), scale


class Objective(nn.Module):
    """Computes the losses of images and tokens.

    Over ranks the losses are this rank's shares; their mean is the loss of the joined batch.

    Args:
        ranks: the processes of the run; this one alone by default.
        backend, check_ranks: of the losses; see `HiMoLoss`.
    """

    def __init__(
        self,
        model: HiMoCLIP,
        settings: TrainConfig,
        ranks: Ranks | None = None,
        *,
        backend: str = "auto",
        check_ranks: bool = True,
    ) -> None:
        super().__init__()
        ranks = ranks or Ranks()
        self.model = model
        towers = Towers(model, settings.precision, settings.channels_last)
        self.compiled = settings.compile
        if self.compiled:  # in place, so that no parameter changes its name
            is_one_batch = ranks.size == 1 and (settings.accum_freq or 1) == 1
            (self if is_one_batch and not settings.cuda_graph_head else towers).compile()
        self.towers = ranks.wrap(towers, sharded=settings.fsdp)
        # A rank with a smaller batch takes as many parts, because each gathers the weights.
        self.least_parts = (settings.accum_freq or 1) if settings.fsdp else 1
        # Small gradients of float16 would be 0; with the other precisions it does nothing.
        self.scaler = torch.amp.GradScaler(
            next(model.parameters()).device.type, enabled=settings.precision == "amp"
        )
        self.himo_loss: HiMoLoss | None = None
        self.graphed: GraphedHiMoLoss | None = None
        # A NaN on one rank reaches all: they name that rank, or skip the step together.
        self.check_finite = ranks.size > 1 and settings.on_nonfinite == "raise"
        self.options: dict[str, Any] = {
            "check_finite": self.check_finite,
            "strategy": settings.exchange,
            # The backend whose kernels a graph can hold.
            "backend": "triton" if settings.cuda_graph_head else backend,
            "check_ranks": check_ranks,
        }
        if settings.loss == "himo":
            self.himo_loss = HiMoLoss(
                settings.preset,
                variance_threshold=settings.tau,
                contrastive_weight=settings.lambda_global,
                component_weight=settings.lambda_comp,
                label_smoothing=settings.label_smoothing,
                decompose_images=settings.decompose_images,
                gap_eps=settings.gap_eps,
                **self.options,
            )
        self.label_smoothing = settings.label_smoothing or 0.0

    def capture_head(self, rows: int, device: torch.device) -> None:
        """Captures the HiMo loss of batches of this many rows for --cuda-graph-head.

        Raises:
            HimoError: a CUDA graph cannot hold it, with the reason.
        """
        assert self.himo_loss is not None
        shape = (rows, self.model.config.embed_dim)
        features = [torch.eye(*shape, device=device).requires_grad_() for _ in range(2)]
        scale = torch.ones((), device=device).requires_grad_()
        try:
            self.graphed = self.himo_loss.make_graphed(features[0], features[1], scale)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).partition(": ")[2]
            raise HimoError(f"--cuda-graph-head: {reason}") from error

    def forward(
        self,
        images: Tensor,  # uint8 [B, 3, R, R]
        tokens: Tensor,  # [B, L]
        max_length: int | None,
        lengths: list[int] | None = None,
    ) -> dict[str, Any]:
        """Returns loss, contrastive_loss, component_loss, rank, text_features (detached).

        component_loss and rank are None without HiDe. The last two arguments are passed to
        `HiMoCLIP.encode_text`.
        """
        return self.losses(*self.towers(images, tokens, max_length, lengths))

    def losses(
        self,
        image_features: Tensor,  # [B, D]
        text_features: Tensor,  # [B, D]
        scale: Tensor,  # []
    ) -> dict[str, Any]:
        """Returns the dictionary of `forward` for given features."""
        if self.himo_loss is not None:
            # The last batch of an epoch may be smaller than the captured ones.
            is_captured = self.graphed is not None and self.graphed.fits(image_features)
            head = self.graphed if is_captured else self.himo_loss
            assert head is not None
            contrastive, component, rank = head.terms(image_features, text_features, scale)
            weights = self.himo_loss.contrastive_weight, self.himo_loss.component_weight
            loss = weights[0] * contrastive + weights[1] * component
        else:
            images_, texts = (F.normalize(t, dim=-1) for t in (image_features, text_features))
            loss = distributed.info_nce(
                images_, texts, scale, label_smoothing=self.label_smoothing, **self.options
            )
            contrastive, component, rank = loss, None, None
        return {
            "loss": loss,
            "contrastive_loss": contrastive,
            "component_loss": component,
            "rank": rank,
            "text_features": text_features.detach(),
        }

    def backward(
        self,
        images: Tensor,
        tokens: Tensor,
        max_length: int,
        size: int,
        lengths: list[int] | None = None,
    ) -> dict[str, Any]:
        """Adds the gradient of the batch's loss, `size` rows at a time; returns as `forward`.

        With --precision amp the gradients are scaled; `scaler.unscale_` divides them.
        """
        try:
            if images.shape[0] <= size and self.least_parts == 1:
                outputs = self(images, *self._texts(tokens, max_length, lengths))
                self.scaler.scale(outputs["loss"]).backward()
                return outputs
            parts = [
                (images_, *self._texts(tokens_, max_length, lengths and lengths[start:][:size]))
                for start, images_, tokens_ in zip(
                    range(0, max(1, len(tokens)), size),
                    images.split(size),
                    tokens.split(size),
                    strict=True,
                )
            ]
            nothing = (images[:0], tokens[:0], max_length, None)
            parts += [nothing] * (self.least_parts - len(parts))
            return cached_backward(self.towers, self.losses, parts, self.scaler.scale)
        except ValueError as error:
            if not self.check_finite:
                raise
            raise HimoError(str(error)) from error  # every rank names the one that is wrong

    def _texts(
        self, tokens: Tensor, max_length: int, lengths: list[int] | None
    ) -> tuple[Tensor, int | None, list[int] | None]:
        """The arguments of `forward` after images, so that torch.compile makes only one graph.

        Without this it makes a graph for each max_length, and for each packing of lengths.
        """
        if not self.compiled:
            return tokens, max_length, lengths
        tokens = tokens[:, :max_length].contiguous()
        torch._dynamo.maybe_mark_dynamic(tokens, 1)
        return tokens, None, None


def rank_doubt(rank: int, pairs: int) -> str | None:
    """Advice if R, the rank of a batch of this many texts, is too low or too high; else None."""
    kept = f"HiDe keeps R = {rank} directions of a batch of {pairs} texts"
    if rank < LEAST_RANK:
        return (
            f"{kept}, below {LEAST_RANK}: the component loss sees little of what tells captions "
            "apart, and may hold training back. Captions that differ in more, a larger "
            "--batch-size or a higher --tau keep more"
        )
    if rank > MOST_RANK_SHARE * pairs:
        return (
            f"{kept}, above half: components are nearly the captions themselves, so the component "
            "loss repeats the contrastive one. A larger --batch-size or a lower --tau keeps a "
            "smaller share of them"
        )
    return None

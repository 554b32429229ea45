"""The joined batch in one process, float64: rank r's share of HiMo's loss by F.cross_entropy."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import himo_kernels


def shares(
    images: Tensor,  # [N, D]
    texts: Tensor,  # [N, D]
    scale: Tensor,
    counts: Sequence[int],
    *,
    scope: str = "global",
    tau: float = 0.9,
    smoothing: float = 0.0,
    weight: float = 1.0,
    normalize_components: bool = True,
    decompose_images: bool = False,
    constants: bool = False,
) -> list[Tensor]:
    """The share of each rank: its rows' mean loss times W times its fraction of the N rows."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    def components(features: Tensor) -> Tensor:
        pieces = [features] if scope == "global" else [p for p in features.split(counts) if len(p)]
        joined = torch.cat(
            [himo_kernels.pca_reconstruct(piece, tau, backend="reference")[0] for piece in pieces]
        )
        return F.normalize(joined, dim=-1) if normalize_components else joined

    queries = components(images) if decompose_images else images
    rows = row_losses(images, texts, scale, smoothing, constants)
    rows = rows + weight * row_losses(queries, components(texts), scale, smoothing, constants)
    return [part.sum() * len(counts) / len(images) for part in rows.split(counts)]


def row_losses(
    images: Tensor, texts: Tensor, scale: Tensor, smoothing: float, constants: bool
) -> Tensor:
    """InfoNCE of each row, both directions averaged [N]."""
    labels = torch.arange(len(images))
    image_keys, text_keys = (t.detach() if constants else t for t in (images, texts))
    directions = (scale * images @ text_keys.T, scale * texts @ image_keys.T)
    return sum(
        F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        for logits in directions
    ) / len(directions)

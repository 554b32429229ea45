"""The semantics of the released HiMo-CLIP code in eager PyTorch, faults included.

Written from a description of that code (commit f235e97), for parity tests and timing. The library
is compared with it, including its faults: an SVD whose autograd divides by differences of all pairs
of singular values, a host sync for the rank, and gathers that return constants.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1
ZERO_VARIANCE = 1e-8


def cumulative_ratio_pca(
    x: Tensor,  # [N, D]
    ratio: float,
) -> Tensor:
    """x reconstructed from the components that reach this ratio of the variance, [N, D] float32.

    Differentiates through torch.linalg.svd and reads the rank on the host.
    """
    mean = x.mean(dim=0, keepdim=True)
    centred = (x - mean).to(torch.promote_types(x.dtype, torch.float32))  # after the subtraction
    _, singular_values, right = torch.linalg.svd(centred, full_matrices=False)
    variance = singular_values.square()
    total = variance.sum()
    if total <= ZERO_VARIANCE:
        rank = singular_values.shape[0]
    else:
        rank = int(torch.where(variance.cumsum(0) / total >= ratio)[0][0].item()) + 1
    basis = right[:rank].T  # [D, R]
    return torch.mm(torch.mm(centred, basis), basis.T) + mean


def all_gather_constants(x: Tensor) -> Tensor:
    """The rows of all ranks, [W * N, D], as constants, including this rank's own rows."""
    if not dist.is_available() or not dist.is_initialized():
        return x.detach()
    gathered = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x.detach().contiguous())
    return torch.cat(gathered)


def himo_loss(
    image_features: Tensor,  # [N, D], this rank's rows
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    ratio: float = 0.85,
) -> tuple[Tensor, Tensor]:
    """(global loss, component loss) of this rank's rows against the rows of all ranks."""
    image_features = image_features / image_features.norm(dim=1, keepdim=True)
    text_features = text_features / text_features.norm(dim=1, keepdim=True)
    component_features = cumulative_ratio_pca(text_features, ratio)

    all_images = all_gather_constants(image_features)
    all_texts = all_gather_constants(text_features)
    all_components = all_gather_constants(component_features)

    return dual_loss(
        image_features,
        text_features,
        component_features,
        logit_scale,
        (all_images, all_texts, all_components),
    )


def dual_loss(
    image_features: Tensor,  # [N, D], this rank's rows
    text_features: Tensor,  # [N, D]
    component_features: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    gathered: tuple[Tensor, Tensor, Tensor],  # the three of all ranks, [W * N, D], constants
) -> tuple[Tensor, Tensor]:
    """(global loss, component loss): four matmuls and four cross-entropies."""
    all_images, all_texts, all_components = gathered
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    rows = image_features.shape[0]
    labels = torch.arange(rows, device=image_features.device) + rank * rows

    def direction(queries: Tensor, keys: Tensor) -> Tensor:
        logits = logit_scale * torch.matmul(queries, keys.T)
        return F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)

    global_loss = direction(image_features, all_texts) + direction(text_features, all_images)
    component_loss = direction(image_features, all_components) + direction(
        component_features, all_images
    )
    return global_loss / 2, component_loss / 2

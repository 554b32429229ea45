"""The best plain PyTorch formulas of each operator, differentiated by autograd.

Each has the operator's inputs and outputs, takes any dtype, and does not sync with the host. In
float64 they are the oracle for every candidate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from himo_kernels.nn import PRESETS


def moment(x: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Mean and X^T X ("covariance") or X X^T ("gram") of x [*, N, D], in float32 or float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(-2)
    centred = x - mean.unsqueeze(-2)
    return mean, centred.mT @ centred if side == "covariance" else centred @ centred.mT


def hide_svd(x: Tensor, tau: float) -> Tensor:
    """HiDe of x [*, N, D] with torch.linalg.svd. A mask applies the rank without a host sync."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-2, keepdim=True)
    _, singular_values, right = torch.linalg.svd(wide - mean, full_matrices=False)
    basis = right * _kept(singular_values.square(), tau).unsqueeze(-1)
    return ((wide - mean) @ basis.mT @ basis + mean).to(x.dtype)


def hide_eigh(x: Tensor, tau: float) -> Tensor:
    """HiDe of x [*, N, D] with torch.linalg.eigh of the smaller Gram matrix, in float64."""
    wide = x.double()
    mean = wide.mean(-2, keepdim=True)
    centred = wide - mean
    fewer_samples = x.shape[-2] < x.shape[-1]
    side = centred @ centred.mT if fewer_samples else centred.mT @ centred
    eigenvalues, vectors = torch.linalg.eigh(side)  # ascending
    vectors = vectors.flip(-1) * _kept(eigenvalues.flip(-1), tau).unsqueeze(-2)
    if fewer_samples:
        reconstruction = vectors @ (vectors.mT @ centred)
    else:
        reconstruction = centred @ vectors @ vectors.mT
    return (reconstruction + mean).to(x.dtype)


def _kept(variances: Tensor, tau: float) -> Tensor:
    # True for the leading components that reach tau; variances [*, n] descending.
    ratio = variances.detach().cumsum(-1) / variances.detach().sum(-1, keepdim=True)
    rank = ((ratio < tau).sum(-1, keepdim=True) + 1).clamp(max=variances.shape[-1])
    return torch.arange(variances.shape[-1], device=variances.device) < rank


def clip_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
    differentiate_keys: bool,
) -> Tensor:
    """open_clip's ClipLoss (mlfoundations/open_clip at 89fb801): one matmul for both directions."""
    labels = torch.arange(image.shape[0], device=image.device)
    if differentiate_keys:
        logits_per_image = logit_scale * image @ text.T
        logits_per_text = logits_per_image.T
    else:
        logits_per_image = logit_scale * image @ text.detach().T
        logits_per_text = logit_scale * text @ image.detach().T
    return (
        F.cross_entropy(logits_per_image, labels, label_smoothing=label_smoothing)
        + F.cross_entropy(logits_per_text, labels, label_smoothing=label_smoothing)
    ) / 2


def siglip_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
) -> Tensor:
    """open_clip's SigLipLoss in one process (open_clip_torch 3.3.0): a matrix of labels."""
    samples = image.shape[0]
    logits = logit_scale * image @ text.T + logit_bias
    labels = 2 * torch.eye(samples, device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / samples


def softplus_loss(
    image: Tensor,  # [*, N, D]
    text: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
) -> Tensor:
    """The same without labels: -logsigmoid(l) = softplus(l) - l, so the diagonal is subtracted."""
    logits = logit_scale * (image @ text.mT) + logit_bias
    positives = logits.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (F.softplus(logits).sum((-2, -1)) - positives) / logits.shape[-1]


def loss_options(preset: str) -> tuple[float, bool]:
    """(label_smoothing, differentiate_keys) of a preset."""
    return PRESETS[preset]["label_smoothing"], PRESETS[preset]["gather_with_grad"]


def himo_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    preset: str,
    tau: float,
    hide=hide_svd,
) -> Tensor:
    """The whole head of a preset: normalise, HiDe, both losses."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    component = hide(text, tau)
    if PRESETS[preset]["normalize_components"]:
        component = F.normalize(component, dim=-1)
    options = loss_options(preset)
    return clip_loss(image, text, logit_scale, *options) + clip_loss(
        image, component, logit_scale, *options
    )

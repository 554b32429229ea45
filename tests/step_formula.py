"""The formulas of a training step, as the paper and the released code have them, for whole runs."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def order(pairs: int, epoch: int, seed: int = 0) -> list[int]:
    """The order of an epoch, as himo's sampler promises it."""
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(pairs).tolist()


def rate(step: int, total: int, lr: float, warmup: int) -> float:
    """The learning rate of train/scheduler.py at a step from 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) * lr


def components(texts: Tensor, tau: float) -> Tensor:
    """Eq. (1), by SVD."""
    mean = texts.mean(0)
    _, singular, right = torch.linalg.svd(texts - mean, full_matrices=False)
    share = singular.square().cumsum(0) / singular.square().sum()
    kept = right[: int((share >= tau).nonzero()[0, 0]) + 1]
    return (texts - mean) @ kept.T @ kept + mean


def dual_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    tau: float,
    *,
    smoothing: float = 0.0,
    unit: bool = True,
    constant_keys: bool = False,
) -> Tensor:
    """Eq. (4) with lambda = 1, by cross-entropy.

    Args:
        smoothing: of the labels.
        unit: normalises the components.
        constant_keys: as the gather of the released code, also of the process's own rows.
    """
    image = image / image.norm(dim=1, keepdim=True)
    text = text / text.norm(dim=1, keepdim=True)
    component = components(text, tau)
    if unit:
        component = component / component.norm(dim=1, keepdim=True)
    labels = torch.arange(len(image))
    loss = torch.zeros(())
    for texts in (text, component):
        for queries, keys in ((image, texts), (texts, image)):
            logits = scale * queries @ (keys.detach() if constant_keys else keys).T
            loss = loss + F.cross_entropy(logits, labels, label_smoothing=smoothing) / 2
    return loss

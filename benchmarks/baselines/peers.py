"""Losses of other libraries, called as documented, one direction at a time.

A loss that cannot run here still gets a row, with the reason.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    image: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
) -> Tensor:
    """torch 2.13's chunked F.linear_cross_entropy, per direction: 12 N^2 D FLOPs with backward."""
    labels = torch.arange(image.shape[0], device=image.device)
    options = torch.nn.LinearCrossEntropyOptions()

    def direction(queries: Tensor, keys: Tensor) -> Tensor:
        queries = (logit_scale * queries).to(keys.dtype)
        return F.linear_cross_entropy(
            queries, keys, labels, label_smoothing=label_smoothing, options=options
        )

    return (direction(image, text) + direction(text, image)) / 2


def inf_cl(image: Tensor, text: Tensor, logit_scale: Tensor, label_smoothing: float) -> Tensor:
    """Inf-CL's single-process loss (inf-cl 1.2.1), which computes in TF32."""
    loss = importlib.import_module("inf_cl").cal_flash_loss
    # It splits D into heads whose size is a power of two, at most 256.
    head = next(size for size in (256, 128, 64, 32, 16) if image.shape[-1] % size == 0)
    rows = loss(image, text, scale=logit_scale, head_dim=head).mean()
    return (rows + loss(text, image, scale=logit_scale, head_dim=head).mean()) / 2


def liger(image: Tensor, text: Tensor, logit_scale: Tensor, label_smoothing: float) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy, per direction."""
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(label_smoothing=label_smoothing)
    labels = torch.arange(image.shape[0], device=image.device)

    def direction(queries: Tensor, keys: Tensor) -> Tensor:
        return loss(keys, (logit_scale * queries).to(keys.dtype), labels)

    return (direction(image, text) + direction(text, image)) / 2


def liger_sm90(image: Tensor, text: Tensor, logit_scale: Tensor, label_smoothing: float) -> Tensor:
    """Liger-Kernel's CuTe kernels for Hopper (liger-kernel 0.8.5), per direction."""
    module = importlib.import_module(LIGER_SM90)
    labels = torch.arange(image.shape[0], device=image.device)

    def direction(queries: Tensor, keys: Tensor) -> Tensor:
        queries = (logit_scale * queries).to(keys.dtype)
        return module.LigerFusedScaledCrossEntropySM90Function.apply(queries, keys, labels).mean()

    return (direction(image, text) + direction(text, image)) / 2


def quack(image: Tensor, text: Tensor, logit_scale: Tensor, label_smoothing: float) -> Tensor:
    """QuACK's chunked linear cross-entropy (quack-kernels 0.6.5), per direction.

    On sm_90 it takes its fused kernels if N is a multiple of 128.
    """
    loss = importlib.import_module(QUACK).chunked_linear_cross_entropy
    labels = torch.arange(image.shape[0], device=image.device)

    def direction(queries: Tensor, keys: Tensor) -> Tensor:
        return loss((logit_scale * queries).to(keys.dtype), keys, labels)

    return (direction(image, text) + direction(text, image)) / 2


LIGER_SM90 = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
QUACK = "quack.linear_cross_entropy"
# What a peer imports, and of those with one dtype or without smoothing.
MODULES = {"inf_cl": "inf_cl", "liger": "liger_kernel", "liger_sm90": LIGER_SM90, "quack": QUACK}
NO_SMOOTHING = ("inf_cl", "liger_sm90", "quack")
BFLOAT16_ONLY = ("liger_sm90", "quack")


def why_not(
    name: str,
    features: Tensor,
    label_smoothing: float,
    differentiate_keys: bool,
) -> str | None:
    """Returns why a peer cannot run on these features or does not compute this loss, or None."""
    if not differentiate_keys:
        return "has no form with constant keys"
    if name == "linear_cross_entropy":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"torch {torch.__version__} has no chunked F.linear_cross_entropy; 2.13 has"
        return None
    if features.device.type != "cuda":
        return "needs a CUDA device"
    if name in BFLOAT16_ONLY and features.dtype != torch.bfloat16:
        return f"needs bfloat16, got {str(features.dtype)[6:]}"
    if name in NO_SMOOTHING and label_smoothing:
        return "has no label smoothing"
    try:
        importlib.import_module(MODULES[name])
    except Exception as error:  # whatever the import raises is the reason
        return f"cannot be imported: {error}".splitlines()[0]
    return None


PEERS = {
    "linear_cross_entropy": linear_cross_entropy,
    "inf_cl": inf_cl,
    "liger": liger,
    "liger_sm90": liger_sm90,
    "quack": quack,
}

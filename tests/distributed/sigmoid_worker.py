"""The sigmoid loss on each rank; run by torchrun, writes FOLDER/RANK.json.

Each check is a relative error of this rank's values or gradients against the joined batch in one
process, or against open_clip's SigLipLoss on the same ranks.
"""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import (
    COUNTS,
    DTYPES,
    RANK,
    WORLD,
    LinearTowers,
    finish,
    found,
    gradients,
    leaves,
    normalized_pairs,
    own_leaves,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from upstream import open_clip_loss

import himo_kernels
from himo_kernels import distributed as hkd
from himo_kernels import testing as hkt
from himo_kernels.sigmoid_loss.op import BLOCK

NAMES = ("images", "texts", "scale", "bias")


def batch(counts: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Images, texts, scale and bias of the joined batch."""
    return normalized_pairs(counts, dtype, 5.0, -2.5)[0]


def pair_losses(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss of every pair [N, N], as SigLIP's algorithm 1 states it."""
    labels = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -F.logsigmoid(labels * (scale * (images @ texts.T) + bias))


def errors(name: str, share: Tensor, grads: list[Tensor], exact: list[Tensor]) -> None:
    """Notes the errors of this rank, with the gradients of scale and bias summed over ranks."""
    grads = [grad.double().clone() for grad in grads]
    for grad in grads[2:]:
        dist.all_reduce(grad)
    for part, actual, truth in zip(("share", *NAMES), (share, *grads), exact, strict=True):
        found[f"{part}, {name}"] = hkt.relative_error(actual, truth) if truth.numel() else 0.0


def check(shape: str, dtype: str, strategy: str, backend: str) -> None:
    counts = COUNTS[shape]
    tensors = batch(counts, DTYPES[dtype])
    if WORLD > 1 and backend != "auto" and BLOCK.why_not(backend, tensors[0]) is not None:
        return
    upstream = [1.0 - 0.3 * rank for rank in range(WORLD)]  # differs between ranks
    joined = leaves(*(tensor.double() for tensor in tensors))
    parts = pair_losses(*joined).sum(1).split(counts)
    weights = [weight * WORLD / sum(counts) for weight in upstream]
    total = sum(weight * part.sum() for weight, part in zip(weights, parts, strict=True))
    images, texts, *scalars = torch.autograd.grad(total, joined)
    exact = [images.split(counts)[RANK], texts.split(counts)[RANK], *scalars]
    own = own_leaves(tensors, counts)
    share = hkd.sigmoid_loss(*own, strategy=strategy, backend=backend)
    grads = torch.autograd.grad(upstream[RANK] * share, own)
    truth = parts[RANK].sum() * WORLD / sum(counts)
    errors(f"{shape}, {dtype}, {strategy}, {backend}", share, list(grads), [truth, *exact])


def check_ddp(shape: str, strategy: str) -> None:
    counts = COUNTS[shape]
    images, texts, *_ = batch(counts, torch.float64)
    alone = LinearTowers(logit_bias=-2.0).double()
    (pair_losses(*alone(images, texts)).sum() / sum(counts)).backward()
    together = DistributedDataParallel(LinearTowers(logit_bias=-2.0).double())
    own = (images.split(counts)[RANK], texts.split(counts)[RANK])
    share = hkd.sigmoid_loss(*together(*own), strategy=strategy)
    share.backward()
    error = hkt.relative_error(gradients(together), gradients(alone))
    found[f"after DDP's mean, {shape}, {strategy}"] = error
    del together  # before the process group, which DDP's reducer must not outlive


def check_open_clip(module: object, exchange: str, strategy: str) -> None:
    """open_clip's loss on the same ranks, alone and after DDP's mean."""
    counts = COUNTS["equal"]
    tensors = batch(counts, torch.float64)
    theirs, own = own_leaves(tensors, counts), own_leaves(tensors, counts)
    loss = module.SigLipLoss(rank=RANK, world_size=WORLD, dist_impl=exchange)(*theirs)
    expected = torch.autograd.grad(loss, theirs)
    share = hkd.sigmoid_loss(*own, strategy=strategy)
    grads = torch.autograd.grad(share, own)
    for part, actual, truth in zip(
        ("share", *NAMES), (share, *grads), (loss, *expected), strict=True
    ):
        name = f"open_clip, {part}, {exchange}, {strategy}"
        found[name] = hkt.relative_error(actual, truth)


def check_refusal() -> None:
    # An error on one rank is the same error on all.
    tensors = own_leaves(batch(COUNTS["equal"], torch.float32), COUNTS["equal"])
    if RANK == WORLD - 1:
        tensors[3] = torch.zeros(2)
    try:
        hkd.sigmoid_loss(*tensors)
        found["refusal"] = 1.0
    except ValueError as error:
        place = f"rank {WORLD - 1}: " if WORLD > 1 else ""
        message = f"{place}sigmoid_loss: expected logit_bias of shape [] or [1], got [2]"
        found["refusal"] = float(str(error) != message)


for arguments in itertools.product(COUNTS, DTYPES, ("gather", "ring"), ("auto", *BLOCK.backends)):
    backend, shape = arguments[-1], arguments[0]
    if backend == "auto" and shape != "uneven":  # one of the others
        continue
    if backend == "triton" and (WORLD != 2 or shape != "uneven"):  # takes seconds if interpreted
        continue
    check(*arguments)
for arguments in itertools.product(("equal", "uneven"), ("gather", "ring")):
    check_ddp(*arguments)
if (module := open_clip_loss()) is not None:
    for arguments in itertools.product(("bidir", "shift", "reduce", "gather"), ("gather", "ring")):
        check_open_clip(module, *arguments)
check_refusal()
found["one process"] = hkt.relative_error(
    himo_kernels.sigmoid_loss(*batch([5], torch.float64)),
    pair_losses(*batch([5], torch.float64)).sum() / 5,
)
finish()

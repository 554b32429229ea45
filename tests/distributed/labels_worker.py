"""InfoNCE of one direction and with labels on each rank; run by torchrun, writes FOLDER/RANK.json.

Each check is a relative error of this rank's values or gradients against the dense formula on the
joined batch, or against one process.
"""

import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from info_nce.pairs_cases import dense
from ranks import (
    COUNTS,
    DTYPES,
    RANK,
    WIDTH,
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

import himo_kernels
from himo_kernels import distributed as hkd
from himo_kernels import testing as hkt
from himo_kernels.distributed.loss import block_for
from himo_kernels.nn import HiMoLoss

ALONE = [dist.new_group([rank]) for rank in range(WORLD)][RANK]
DIRECTIONS = ("both", "rows", "columns")
# With labels, drawn from a third as many values as there are rows, only "gather".
PAIRS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no labels": ({}, ("gather", "ring")),
    "positive": ({"same_label": "positive"}, ("gather",)),
    "exclude": ({"same_label": "exclude"}, ("gather",)),
}
NAMES = ("images", "texts", "scale")


def batch(counts: list[int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Images, texts and scale of the joined batch, and its labels; equal on every rank."""
    tensors, generator = normalized_pairs(counts, dtype, 5.0)
    labels = torch.randint(-(sum(counts) // 3) - 1, 0, (sum(counts),), generator=generator)
    return tensors, labels


def note(name: str, share: Tensor, grads: list[Tensor], exact: list[Tensor]) -> None:
    """Notes the errors of this rank, with the gradient of the scale summed over ranks."""
    images, texts, scale = (grad.double().clone() for grad in grads)
    dist.all_reduce(scale)
    for part, actual, truth in zip(
        ("share", *NAMES), (share, images, texts, scale), exact, strict=True
    ):
        # The gradients of a loss of one row are 0, or a rounding error.
        size = max(float(truth.norm()), 1e-3) if truth.numel() else 1.0
        found[f"{part}, {name}"] = float((actual.double() - truth).norm()) / size


def row_losses(joined: list[Tensor], directions: str, **settings: Any) -> Tensor:
    """The loss of each row [N] of the joined batch; of "both", the mean of row i and column i."""
    names = ("rows", "columns") if directions == "both" else (directions,)
    losses = [dense(*joined, directions=name, reduction="none", **settings) for name in names]
    return sum(losses) / len(losses)


def backends_of(given: dict[str, Any], features: Tensor, constants: bool) -> list[str]:
    """The backends that can run, the interpreter of Triton (seconds a call) on two ranks only."""
    block = block_for(features if given else None)
    names = [name for name in block.backends if block.why_not(name, features) is None]
    if WORLD != 2 or constants:
        names = [name for name in names if name != "triton"]
    return ["auto", *names]


def check(shape: str, dtype: str, directions: str, pairs: str, constants: bool) -> None:
    counts = COUNTS[shape]
    tensors, labels = batch(counts, DTYPES[dtype])
    given, strategies = PAIRS[pairs]
    settings = {"label_smoothing": 0.1, "differentiate_keys": not constants, **given}
    upstream = [1.0 - 0.3 * rank for rank in range(WORLD)]  # differs between ranks
    joined = leaves(*(tensor.double() for tensor in tensors))
    of_all = {"labels": labels} if given else {}
    parts = row_losses(joined, directions, **settings, **of_all).split(counts)
    weights = [weight * WORLD / sum(counts) for weight in upstream]
    total = sum(weight * part.sum() for weight, part in zip(weights, parts, strict=True))
    grads = torch.autograd.grad(total, joined, materialize_grads=True)
    truth = parts[RANK].sum() * WORLD / sum(counts)
    exact = [truth.detach(), *(grad.split(counts)[RANK] for grad in grads[:2]), grads[2]]
    one = leaves(*tensors)
    loss = himo_kernels.info_nce(*one, directions=directions, **settings, **of_all)
    alone = torch.autograd.grad(loss, one, materialize_grads=True)
    backends = backends_of(given, tensors[0], constants) if shape == "uneven" else ["auto"]
    for strategy, backend in itertools.product(strategies, backends):
        own = own_leaves(tensors, counts)
        of_rank = {"labels": labels.split(counts)[RANK].int()} if given else {}
        share = hkd.info_nce(
            *own, strategy=strategy, directions=directions, backend=backend, **settings, **of_rank
        )
        grads = torch.autograd.grad(
            upstream[RANK] * share, own, retain_graph=True, materialize_grads=True
        )
        name = f"{shape}, {dtype}, {directions}, {pairs}, {strategy}, constants={constants}"
        note(f"{name}, {backend}", share.detach(), list(grads), exact)
        if dtype == "float32" or backend != "auto":
            continue
        # And the mean of the shares against the operator of one process.
        grads = torch.autograd.grad(share, own, materialize_grads=True)
        mean = share.detach().clone()
        dist.all_reduce(mean)
        of_one = [grad.split(counts)[RANK] for grad in alone[:2]]
        scaled = [grad / WORLD for grad in grads]
        note(f"one process, {name}", mean / WORLD, scaled, [loss.detach(), *of_one, alone[2]])


def check_ddp(shape: str, preset: str, of_both: bool) -> None:
    # The whole head with labels, against the head of one process; its terms besides.
    counts = COUNTS[shape]
    (images, texts, _), labels = batch(counts, torch.float64)
    settings = {"pca_scope": "global", "decompose_images": of_both, "variance_threshold": 0.8}
    head, one = (HiMoLoss(preset, group=group, **settings) for group in (None, ALONE))
    alone, together = LinearTowers().double(), DistributedDataParallel(LinearTowers().double())
    one(*alone(images, texts), labels=labels).backward()
    own = [tensor.split(counts)[RANK] for tensor in (images, texts, labels)]
    head(*together(*own[:2]), labels=own[2]).backward()
    name = f"{shape}, {preset}, decompose_images={of_both}"
    found[f"head after DDP's mean, {name}"] = hkt.relative_error(
        gradients(together), gradients(alone)
    )
    expected = one.terms(*alone(images, texts), labels=labels)
    actual = head.terms(*together(*own[:2]), labels=own[2])
    for term in ("contrastive_loss", "component_loss"):
        mean = getattr(actual, term).detach().clone()
        dist.all_reduce(mean)
        error = hkt.relative_error(mean / WORLD, getattr(expected, term))
        found[f"head, {term}, {name}"] = error
    if preset == "paper":
        unit = [F.normalize(x, dim=-1) for x in alone(images, texts)[:2]]
        exact = dense(*unit, alone.log_scale.exp(), labels=labels, same_label="exclude")
        found[f"head against the formula, {name}"] = hkt.relative_error(
            expected.contrastive_loss, exact
        )
    del together  # before the process group, which DDP's reducer must not outlive


def check_without_grad() -> None:
    # Frozen images: no gradient of theirs is sent back, and none is asked for on a rank alone.
    counts = COUNTS["uneven"]
    tensors, labels = batch(counts, torch.float64)
    images, texts, scale = own_leaves(tensors, counts)
    joined = leaves(*tensors)
    own = labels.split(counts)[RANK]
    share = hkd.info_nce(images.detach(), texts, scale, labels=own)
    (grad,) = torch.autograd.grad(share, [texts])
    (exact,) = torch.autograd.grad(himo_kernels.info_nce(*joined, labels=labels), [joined[1]])
    found["frozen images"] = hkt.relative_error(grad / WORLD, exact.split(counts)[RANK])
    with torch.no_grad():
        value = hkd.info_nce(images, texts, scale, labels=own)
    found["no gradient"] = float(not torch.equal(value, share))


def check_half(dtype: torch.dtype) -> None:
    # Values of 16-bit features; ranks without rows have their dtype too.
    counts = COUNTS["an empty rank"]
    tensors, labels = batch(counts, dtype)
    images, texts, scale = own_leaves([*tensors[:2], tensors[2].float()], counts)
    share = hkd.info_nce(images, texts, scale, labels=labels.split(counts)[RANK])
    grads = torch.autograd.grad(share, [images, texts, scale])
    dtypes = [share.dtype, *(grad.dtype for grad in grads)]
    expected = [torch.float32, dtype, dtype, torch.float32]
    mean = share.detach().double()
    dist.all_reduce(mean)
    exact = dense(*(tensor.double() for tensor in tensors), labels=labels)
    found[f"half, {dtype}"] = hkt.relative_error(mean / WORLD, exact)
    found[f"dtypes, {dtype}"] = float(dtypes != expected)


def check_unchecked() -> None:
    # check_ranks=False changes no bit; strides of features and labels change only the rounding.
    counts = COUNTS["equal"]
    tensors, labels = batch(counts, torch.float64)
    own = own_leaves(tensors, counts)
    strided = leaves(own[0].T.contiguous().T, own[1].repeat(1, 2)[:, :WIDTH], own[2])
    of_rank = labels.split(counts)[RANK]
    results = []
    for inputs, given, check_ranks in (
        (own, of_rank, True),
        (own, of_rank, False),
        (strided, of_rank.repeat_interleave(2)[::2], True),
    ):
        share = hkd.info_nce(*inputs, labels=given, check_ranks=check_ranks)
        share = share + HiMoLoss(check_ranks=check_ranks)(*inputs, labels=given)
        results.append([share, *torch.autograd.grad(share, inputs)])
    found["unchecked"] = float(not all(map(torch.equal, results[0], results[1])))
    pairs = zip(results[0], results[2], strict=True)
    found["strided"] = max(hkt.relative_error(other, one) for one, other in pairs)


def check_traffic() -> None:
    counts = COUNTS["equal"]
    (images, texts, scale), labels = batch(counts, torch.float32)
    own = own_leaves([images, texts, scale], counts)
    with hkd.count_traffic() as traffic:
        HiMoLoss()(*own, labels=labels.split(counts)[RANK]).backward()
    found["traffic"] = {"bytes": dict(traffic.bytes), "rows": counts[RANK], "features": WIDTH}


for arguments in itertools.product(COUNTS, DTYPES, DIRECTIONS, PAIRS, (False, True)):
    # A float32 gradient of few rows loses digits by cancellation, which no exchange causes.
    if arguments[0] == "uneven" or arguments[1] == "float64":
        check(*arguments)
for arguments in itertools.product(COUNTS, ("paper", "official"), (False, True)):
    if arguments[0] != "one row each":  # the PCA of one row per rank cuts in the middle of a gap
        check_ddp(*arguments)
check_without_grad()
check_unchecked()
for dtype in (torch.bfloat16, torch.float16):
    check_half(dtype)
if WORLD > 1:
    check_traffic()
finish()

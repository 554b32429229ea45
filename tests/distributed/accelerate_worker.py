"""Errors of accelerated losses against the originals; run by torchrun, writes FOLDER/RANK.json."""

import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ranks import RANK, SEED, WORLD, finish, found
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from upstream import ReleasedCLIP, Towers, open_clip_loss

import himo_kernels
from benchmarks.baselines import libraries
from himo_kernels.distributed import count_traffic

ROWS, WIDTH, FEATURES = 12, 24, 16
torch.manual_seed(SEED)
batch = torch.randn(WORLD, ROWS, WIDTH, dtype=torch.float64)
image, text = batch[RANK], batch[RANK] + 0.5 * torch.randn(WORLD, ROWS, WIDTH).double()[RANK]


def run(model: nn.Module, step) -> tuple[Tensor, list[Tensor]]:
    """Values, and gradients after DDP's mean."""
    ddp = DistributedDataParallel(model)
    values = torch.stack(step(ddp))
    values.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return values.detach(), gradients


def compare(name: str, model: nn.Module, accelerated: nn.Module, step, **options: object) -> None:
    expected = run(model, step)
    with himo_kernels.accelerate(accelerated, **options), count_traffic() as traffic:
        values, gradients = run(model, step)
    found[f"{name}, all_reduces"] = traffic.calls["all_reduce"]
    found[f"{name}, values"] = float((values - expected[0]).abs().max())
    errors = [
        (one - other).norm() / max(other.norm(), 1e-3)  # a bias's gradient is only rounding
        for one, other in zip(gradients, expected[1], strict=True)
    ]
    found[f"{name}, gradients"] = float(max(errors))


clip = open_clip_loss()
flags = itertools.product((True, False), (True, False), ("gather", "ring")) if clip else ()
for local_loss, gather_with_grad, strategy in flags:
    loss = clip.ClipLoss(local_loss, gather_with_grad, rank=RANK, world_size=WORLD)
    compare(
        f"open_clip, local_loss={local_loss}, gather_with_grad={gather_with_grad}, {strategy}",
        Towers(WIDTH, FEATURES).double(),
        loss,
        lambda ddp, loss=loss: [loss(**ddp(image, text))],
        strategy=strategy,
    )


def ranked(
    loss: Any, cached: bool, image_features: Tensor, text_features: Tensor, **others: Tensor
) -> Tensor:
    """Queries, documents and hard negatives, as a MultipleNegativesRankingLoss is called."""
    columns = [image_features, text_features, text_features.roll(1, 0)]
    if cached:
        value = loss.calculate_loss([x.split(5) for x in columns])
    else:
        value = loss.compute_loss_from_embeddings(columns, None)
    return value + 0 * sum(others.values())  # parameters that it does not use get a gradient too


def compare_losses() -> None:
    """The other losses that know of ranks."""

    def of(name: str, loss: Any, call: Callable[..., Tensor], **options: object) -> None:
        towers = Towers(WIDTH, FEATURES).double()
        compare(name, towers, loss, lambda ddp: [call(**ddp(image, text))], **options)

    def contrast(image_features: Tensor, text_features: Tensor, **others: Tensor) -> Tensor:
        return loss(image_features, text_features) + 0 * sum(others.values())

    if clip:
        for number, strategy in enumerate(("gather", "ring", "gather", "ring")):
            dist_impl = ("bidir", "shift", "reduce", "gather")[number]
            loss = clip.SigLipLoss(rank=RANK, world_size=WORLD, dist_impl=dist_impl)
            of(f"siglip, {dist_impl}, {strategy}", loss, loss, strategy=strategy)
        loss = clip.CoCaLoss(
            2.0, 0.5, local_loss=True, gather_with_grad=True, rank=RANK, world_size=WORLD
        )
        logits, labels = torch.zeros(ROWS, 3, 5).double(), torch.ones(ROWS, 3).long()

        def caption(image_features, text_features, logit_scale, logit_bias) -> Tensor:
            values = loss(image_features, text_features, logits, labels, logit_scale)
            return sum(values) + 0 * logit_bias

        of("coca", loss, caption)
    package = libraries.sentence_transformers()
    both, every = ("query_to_doc", "doc_to_query"), ("query_to_query", "doc_to_doc")
    settings = (
        {},
        {"directions": both, "partition_mode": "per_direction"},
        {"directions": both + every},
    )
    for cached, setting in itertools.product((False, True), settings) if package else ():
        name = "Cached" * cached + "MultipleNegativesRankingLoss"
        loss = getattr(package, name)(None, gather_across_devices=True, **setting)

        of(f"{name}, {setting}", loss, partial(ranked, loss, cached))
    NTXentLoss = libraries.lightly()
    if NTXentLoss:
        loss = NTXentLoss(gather_distributed=True)
        of("lightly", loss, contrast)
    loss = libraries.grad_cache().DistributedContrastiveLoss(0)
    of("grad_cache", loss, contrast)


compare_losses()
model = ReleasedCLIP(WIDTH, FEATURES).double()
compare("released", model, model, lambda ddp: list(ddp(image, text, RANK, pca_ratio=0.9)))

gc.collect()  # gloo aborts if a DDP module outlives the group
finish()

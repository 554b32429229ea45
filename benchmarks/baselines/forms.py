"""The forms of info_nce_pairs: this library's calls, plain formulas, other libraries' losses."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import himo_kernels
from benchmarks.baselines import libraries
from benchmarks.cases import Case

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

PER_LABEL = 4  # rows of one label


def library(inputs: Inputs, case: Case, backend: str) -> Outputs:
    """The loss by himo_kernels."""
    image, *others, scale = inputs.values()
    if case.form == "simclr":
        views = [himo_kernels.normalize(view, backend=backend) for view in (image, *others)]
        return (himo_kernels.nt_xent(*views, scale, backend=backend),)
    options: dict[str, Any] = {"directions": "rows"}
    if case.form == "labels":
        options |= {"labels": _labels(image), "exclude_self": True}
    if case.form == "exclude":
        options = {"labels": _labels(image), "same_label": "exclude"}
    keys = torch.cat(others) if others else image
    return (himo_kernels.info_nce(image, keys, scale, backend=backend, **options),)


def formula(inputs: Inputs, case: Case) -> Outputs:
    """The loss in plain PyTorch, with masks."""
    image, *others, scale = inputs.values()
    rows = F.normalize(torch.cat([image, *others]), dim=-1) if case.form == "simclr" else image
    keys = rows if case.form in ("simclr", "labels") else torch.cat(others)
    logits = scale * rows @ keys.T
    own = torch.arange(len(rows), device=rows.device)
    if case.form == "simclr":
        logits = logits.masked_fill(own[:, None] == own, -torch.inf)
        return (F.cross_entropy(logits, own.roll(len(image))),)
    if case.form == "labels":
        labels, other = _labels(image), own[:, None] != own
        positive = (labels[:, None] == labels) & other
        log_p = F.log_softmax(logits.masked_fill(~other, -torch.inf), 1)
        return (-(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean(),)
    if case.form == "exclude":
        labels = _labels(image)
        excluded = (labels[:, None] == labels) & (own[:, None] != own)
        logits = logits.masked_fill(excluded, -torch.inf)
        return ((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2,)
    return (F.cross_entropy(logits, own),)


def _labels(image: Tensor) -> Tensor:
    return torch.arange(len(image), device=image.device) // PER_LABEL


def _sentence_transformers(inputs: Inputs, case: Case) -> Outputs:
    package = libraries.sentence_transformers()
    *columns, scale = inputs.values()
    loss = package.MultipleNegativesRankingLoss(None, similarity_fct=package.dot_score)
    loss.scale = scale  # a tensor, which has a gradient
    return (loss.compute_loss_from_embeddings(columns, None),)


def _metric_learning(inputs: Inputs, case: Case) -> Outputs:
    package = libraries.metric_learning()
    distance = package.distances.DotProductSimilarity(normalize_embeddings=False)
    image, scale = inputs.values()
    loss = package.losses.SupConLoss(temperature=1 / scale, distance=distance)
    return (loss(image, _labels(image)),)


def _lightly(inputs: Inputs, case: Case) -> Outputs:
    *views, scale = inputs.values()
    loss = libraries.lightly()()
    loss.temperature = 1 / scale
    return (loss(*views),)


def _why_not(package: str, of: tuple[str, ...]) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        if case.form not in of:
            return "has no such form"
        if getattr(libraries, package)() is None:
            return "is not installed"
        return None

    return why_not


PUBLISHED = {
    "sentence-transformers": (
        _sentence_transformers,
        _why_not("sentence_transformers", ("rows", "negatives")),
    ),
    "pytorch-metric-learning": (_metric_learning, _why_not("metric_learning", ("labels",))),
    "lightly": (_lightly, _why_not("lightly", ("simclr",))),
}

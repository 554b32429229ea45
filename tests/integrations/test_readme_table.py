"""Every line of code in the README's table gives the value of the library's loss in its row."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from upstream import open_clip_loss

import himo_kernels
from benchmarks.baselines import libraries
from himo_kernels.testing import relative_error

README = Path(himo_kernels.__file__).parent / "integrations" / "README.md"
PACKAGES = (libraries.sentence_transformers, libraries.metric_learning, libraries.lightly)
ROWS, FEATURES, KEYS = 12, 8, 20
CODE = re.findall(r"^\| .* \| `([^`]*\(.*)` \|$", README.read_text(), re.MULTILINE)


@pytest.fixture
def names(generator: torch.Generator) -> SimpleNamespace:
    """What the table calls f, g, h, b and so on."""

    def table(rows: int) -> Tensor:
        return torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)

    zeros = torch.zeros(ROWS, dtype=torch.int64)
    return SimpleNamespace(
        f=table(ROWS),
        g=table(ROWS),
        h=table(ROWS),
        b=F.normalize(table(KEYS), dim=1),
        s=5.0,
        bias=-3.0,
        clip_loss_weight=0.5,
        target=torch.arange(ROWS).flip(0),
        labels=torch.arange(ROWS) // 2,
        zeros=zeros,
        zeros_then_ones=torch.cat([zeros, torch.ones(KEYS, dtype=torch.int64)]),
        torch=torch,
        n=F.normalize,
        info_nce=himo_kernels.info_nce,
        nt_xent=himo_kernels.nt_xent,
        sigmoid_loss=himo_kernels.sigmoid_loss,
    )


def clip(x: Any) -> Tensor:
    return open_clip_loss().ClipLoss()(x.f, x.g, x.s)


def coca(x: Any) -> Tensor:
    loss = open_clip_loss().CoCaLoss(1.0, x.clip_loss_weight)
    tokens = torch.zeros(ROWS, 2, 3), torch.ones(ROWS, 2).long()
    return loss(x.f, x.g, *tokens, x.s)[0]


def siglip(x: Any) -> Tensor:
    return open_clip_loss().SigLipLoss()(x.f, x.g, x.s, x.bias)


def ranking(x: Any, *columns: Tensor, **settings: Any) -> Tensor:
    kind = libraries.sentence_transformers().MultipleNegativesRankingLoss
    return kind(None, scale=x.s, **settings).compute_loss_from_embeddings([x.f, *columns], None)


def metric(x: Any, name: str) -> Tensor:
    return getattr(libraries.metric_learning().losses, name)(temperature=1 / x.s)(x.f, x.labels)


def two_views(x: Any, **settings: Any) -> Tensor:
    loss = libraries.lightly()(temperature=1 / x.s, **settings).double()
    if settings:
        loss.memory_bank.bank.copy_(x.b)
    return loss(x.f, x.g)


def queries(x: Any) -> Tensor:
    return libraries.grad_cache().SimpleContrastiveLoss()(x.f, x.g, target=x.target)


BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
LOSSES: list[Callable[[Any], Tensor]] = [  # in the order of the table
    clip,
    coca,
    siglip,
    lambda x: ranking(x, x.g),
    lambda x: ranking(x, x.g, x.h),
    lambda x: ranking(x, x.g, **BOTH),
    queries,
    lambda x: metric(x, "SupConLoss"),
    lambda x: metric(x, "NTXentLoss"),
    two_views,
    lambda x: two_views(x, memory_bank_size=(KEYS, FEATURES)),
]


@pytest.mark.parametrize("code, loss", [*zip(CODE, LOSSES, strict=True)], ids=range(len(LOSSES)))
def test_a_line_of_the_table(code, loss, names):
    if None in (open_clip_loss(), *(of() for of in PACKAGES)):
        pytest.skip("a package is not installed (make setup)")
    expected = loss(names)
    assert relative_error(eval(code, vars(names)), expected) <= 1e-12

"""A batch in float64, and a backend's results block by block, joined again."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype
from himo_kernels.info_nce.block import block_bwd, block_fwd
from himo_kernels.info_nce.compose import Direction, Settings
from himo_kernels.testing import power_law

SAMPLES, FEATURES, SMOOTHING = 45, 10, 0.1
# Cuts of rows and keys: pairs on the diagonal of a block, off its diagonal, and not in its rows.
ROW_CUTS, KEY_CUTS = (0, 13, 14, 45), (0, 20, 45)


class Batch:
    """A whole batch, its statistics in float64, and weights of its nlls."""

    def __init__(self, image: Tensor, text: Tensor, scale: float, generator: torch.Generator):
        self.image, self.text = image, text
        self.scale = torch.tensor(scale, dtype=accumulation_dtype(image.dtype), device=image.device)
        self.weights = [
            torch.rand(len(image), generator=generator, dtype=torch.float64).to(image.device)
            for _ in range(2)
        ]
        self.logits = scale * image.double() @ text.double().mT
        self.positives = self.logits.diagonal()
        self.log_odds = [self._log_odds(logits) for logits in (self.logits, self.logits.mT)]
        self.nlls = [F.softplus(odds) for odds in self.log_odds]

    def _log_odds(self, logits: Tensor) -> Tensor:
        eye = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        return torch.logsumexp((logits - self.positives[:, None]).masked_fill(eye, -torch.inf), 1)

    def grad_logits(self) -> tuple[Tensor, Tensor]:
        """dL/dS of the rows' and of the columns' nlls, by autograd of F.cross_entropy."""
        found = []
        for weight, turned in zip(self.weights, (False, True), strict=True):
            logits = self.logits.clone().requires_grad_()
            labels = torch.arange(len(logits), device=logits.device)
            losses = F.cross_entropy(
                logits.mT if turned else logits,
                labels,
                label_smoothing=SMOOTHING,
                reduction="none",
            )
            found += torch.autograd.grad((weight * losses).sum(), logits)
        return found[0], found[1]

    def gradients(self, differentiate_keys: bool) -> tuple[Tensor, Tensor]:
        of_rows, of_columns = self.grad_logits()
        if differentiate_keys:
            of_rows = of_columns = of_rows + of_columns
        return of_rows @ self.text.double(), of_columns.mT @ self.image.double()


def random_batch(
    dtype: torch.dtype, device: str, generator: torch.Generator, samples: int = SAMPLES
) -> Batch:
    image = power_law(samples, FEATURES, dtype=dtype, generator=generator).to(device)
    text = power_law(samples, FEATURES, dtype=dtype, generator=generator).to(device)
    return Batch(image, text, 7.0, generator)


def cut(cuts: tuple[int, ...]) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise(cuts)]


def joined_fwd(batch: Batch, backend: str, rows=ROW_CUTS, keys=KEY_CUTS) -> tuple[Tensor, Tensor]:
    dtype = batch.scale.dtype
    positives = batch.positives.to(dtype)
    found = [torch.full_like(positives, -torch.inf) for _ in range(2)]
    for row, key in itertools.product(cut(rows), cut(keys)):
        parts = block_fwd(
            batch.image[row],
            batch.text[key],
            batch.scale,
            positives[row],
            positives[key],
            row.start - key.start,
            backend,
        )
        for whole, at, part in zip(found, (row, key), parts, strict=True):
            assert part.dtype == dtype and part.shape == whole[at].shape
            whole[at] = torch.logaddexp(whole[at], part)
    return found[0], found[1]


def joined_bwd(
    batch: Batch, backend: str, differentiate_keys: bool, rows=ROW_CUTS, keys=KEY_CUTS
) -> tuple[Tensor, Tensor]:
    dtype = batch.scale.dtype
    positives, row_nll, column_nll, row_weight, column_weight = (
        x.to(dtype) for x in (batch.positives, *batch.nlls, *batch.weights)
    )
    found = [torch.zeros_like(x, dtype=dtype) for x in (batch.image, batch.text)]
    for row, key in itertools.product(cut(rows), cut(keys)):
        parts = block_bwd(
            batch.image[row],
            batch.text[key],
            batch.scale,
            Direction(positives[row], row_nll[row], row_weight[row]),
            Direction(positives[key], column_nll[key], column_weight[key]),
            row.start - key.start,
            Settings(SMOOTHING, differentiate_keys),
            len(batch.image),
            backend,
        )
        for whole, at, part in zip(found, (row, key), parts, strict=True):
            assert part.dtype == dtype and part.shape == whole[at].shape
            whole[at] += part
    return found[0], found[1]

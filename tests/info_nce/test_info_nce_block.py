"""Blocks of the logits of a larger batch: joined again they are the whole, on every backend."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from himo_kernels._dispatch import accumulation_dtype
from himo_kernels.info_nce.block import BLOCK, block_bwd, block_fwd
from himo_kernels.testing import assert_within_budget, confident_positives, power_law

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SAMPLES, FEATURES, SMOOTHING = 45, 10, 0.1
# Where rows and keys are cut: pairs on the diagonal of a block, beside it, and in none of its rows.
ROW_CUTS, KEY_CUTS = (0, 13, 14, 45), (0, 20, 45)


def targets(*dtypes: torch.dtype) -> list:
    found = []
    for backend, device, dtype in itertools.product(BLOCK.backends, DEVICES, dtypes):
        gpu = [pytest.mark.gpu] if device == "cuda" else []
        name = f"{backend}-{device}-{str(dtype)[6:]}"
        if BLOCK.why_not(backend, torch.empty(2, 2, dtype=dtype, device=device)) is None:
            found.append(pytest.param(backend, device, dtype, id=name, marks=gpu))
    return found


EVERY = pytest.mark.parametrize(
    "backend, device, dtype",
    targets(torch.float64, torch.float32, torch.bfloat16, torch.float16),
)
FLOAT32 = pytest.mark.parametrize("backend, device, dtype", targets(torch.float32))
KEYS = pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant keys"])


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


def random_batch(dtype: torch.dtype, device: str, generator: torch.Generator) -> Batch:
    image = power_law(SAMPLES, FEATURES, dtype=dtype, generator=generator).to(device)
    text = power_law(SAMPLES, FEATURES, dtype=dtype, generator=generator).to(device)
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
            positives[row],
            row_nll[row],
            row_weight[row],
            positives[key],
            column_nll[key],
            column_weight[key],
            row.start - key.start,
            SMOOTHING,
            len(batch.image),
            differentiate_keys,
            backend,
        )
        for whole, at, part in zip(found, (row, key), parts, strict=True):
            assert part.dtype == dtype and part.shape == whole[at].shape
            whole[at] += part
    return found[0], found[1]


def assert_each_within_budget(actual, eager, exact) -> None:
    for name, *values in zip(("rows", "columns"), actual, eager, exact, strict=True):
        assert_within_budget(name, *values, terms=SAMPLES + FEATURES)


@EVERY
def test_statistics_within_the_budget(backend, device, dtype, generator):
    batch = random_batch(dtype, device, generator)
    eager = joined_fwd(batch, "reference")
    assert_each_within_budget(joined_fwd(batch, backend), eager, batch.log_odds)


@EVERY
@KEYS
def test_gradients_within_the_budget(backend, device, dtype, differentiate_keys, generator):
    batch = random_batch(dtype, device, generator)
    eager = joined_bwd(batch, "reference", differentiate_keys)
    found = joined_bwd(batch, backend, differentiate_keys)
    assert_each_within_budget(found, eager, batch.gradients(differentiate_keys))


@FLOAT32
def test_confident_positives_keep_their_digits(backend, device, dtype, generator):
    image, text = confident_positives(SAMPLES, FEATURES, dtype=dtype, generator=generator)
    batch = Batch(image.to(device), text.to(device), 100.0, generator)
    assert batch.nlls[0].exp().reciprocal().median() > 0.99
    eager = joined_bwd(batch, "reference", True)
    assert_each_within_budget(joined_bwd(batch, backend, True), eager, batch.gradients(True))


@FLOAT32
@KEYS
def test_strides_and_another_run(backend, device, dtype, differentiate_keys, generator):
    batch = random_batch(dtype, device, generator)

    def run() -> tuple[Tensor, ...]:
        return *joined_fwd(batch, backend), *joined_bwd(batch, backend, differentiate_keys)

    expected = run()
    assert all(map(torch.equal, run(), expected))
    # As keys arrive, beside those of the other loss; and columns that are contiguous.
    batch.text = torch.cat([batch.text, batch.text], 1)[:, FEATURES:]
    batch.image = batch.image.mT.contiguous().mT
    for value, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


@FLOAT32
def test_an_empty_block(backend, device, dtype, generator):
    batch = random_batch(dtype, device, generator)
    cuts = {"rows": (0, 0, 20, 45), "keys": (0, 45, 45)}
    whole = (*joined_fwd(batch, backend), *joined_bwd(batch, backend, True))
    found = (*joined_fwd(batch, backend, **cuts), *joined_bwd(batch, backend, True, **cuts))
    for value, other in zip(found, whole, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


@FLOAT32
def test_nan_stays_in_its_row_and_in_the_columns(backend, device, dtype, generator):
    batch = random_batch(dtype, device, generator)
    positives = batch.positives.float()
    batch.image[3, 2] = torch.nan
    part = slice(0, 13)
    rows, columns = block_fwd(
        batch.image[part], batch.text, batch.scale, positives[part], positives, 0, backend
    )
    assert rows.isnan().nonzero().flatten().tolist() == [3]
    assert columns.isnan().nonzero().flatten().tolist() == [j for j in range(SAMPLES) if j != 3]

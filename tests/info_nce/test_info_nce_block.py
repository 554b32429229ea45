"""Blocks of the logits of a larger batch: joined, they equal the whole, on every backend."""

import itertools

import pytest
import torch
from block_cases import FEATURES, SAMPLES, Batch, joined_bwd, joined_fwd, random_batch
from torch import Tensor

from himo_kernels.info_nce.block import BLOCK, block_fwd
from himo_kernels.testing import (
    assert_within_budget,
    confident_positives,
    relative_error,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# Masked lanes hold arbitrary values, about which NumPy warns and a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


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
HALVES = pytest.mark.parametrize("backend, device, dtype", targets(torch.bfloat16, torch.float16))
KEYS = pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant keys"])


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


@HALVES
@KEYS
@pytest.mark.sample
def test_small_weights_and_many_samples_in_16_bits(
    backend, device, dtype, differentiate_keys, generator
):
    # Weights as in a mean over many ranks, below the range of float16, and enough samples for dS to
    # have 16 bits. The error of that is below the rounding of gradients to the features' dtype.
    samples = 136 if backend == "triton" else 270  # from 128, or from 256 on
    batch = random_batch(dtype, device, generator, samples)
    batch.weights = [1e-7 * values for values in batch.weights]
    cuts = {"rows": (0, 100, samples), "keys": (0, 130, samples)}
    found = joined_bwd(batch, backend, differentiate_keys, **cuts)
    for value, exact in zip(found, batch.gradients(differentiate_keys), strict=True):
        assert relative_error(value, exact) <= torch.finfo(dtype).eps / 2


@FLOAT32
def test_confident_positives_keep_their_digits(backend, device, dtype, generator):
    image, text = confident_positives(SAMPLES, FEATURES, dtype=dtype, generator=generator)
    batch = Batch(image.to(device), text.to(device), 100.0, generator)
    assert batch.nlls[0].exp().reciprocal().median() > 0.99
    eager = joined_bwd(batch, "reference", True)
    assert_each_within_budget(joined_bwd(batch, backend, True), eager, batch.gradients(True))


@FLOAT32
@KEYS
@pytest.mark.sample
def test_strides_and_another_run(backend, device, dtype, differentiate_keys, generator):
    batch = random_batch(dtype, device, generator)

    def run() -> tuple[Tensor, ...]:
        return *joined_fwd(batch, backend), *joined_bwd(batch, backend, differentiate_keys)

    expected = run()
    assert all(map(torch.equal, run(), expected))
    # As keys arrive, in one buffer with the other loss's keys; and contiguous columns.
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

"""pca_reconstruct by parts: rows split anywhere and joined equal those of the whole batch."""

import itertools

import pytest
import torch
from torch import Tensor

from himo_kernels.pca import moment, reference
from himo_kernels.pca.moment import MOMENT
from himo_kernels.testing import DEGENERATE, power_law, relative_error

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SAMPLES, FEATURES = 60, 21
CUTS = (0, 17, 17, 60)  # one process has no rows
THRESHOLDS = (0.3, 0.9, 1.0)  # fewer kept than dropped, fewer dropped than kept, none dropped
BASIS = pytest.mark.parametrize("constant", [False, True], ids=["basis", "constant-basis"])


def targets() -> list:
    found = []
    for backend, device in itertools.product(MOMENT.backends, DEVICES):
        gpu = [pytest.mark.gpu] if device == "cuda" else []
        if MOMENT.why_not(backend, torch.empty(2, 2, device=device)) is None:
            found.append(pytest.param(backend, device, id=f"{backend}-{device}", marks=gpu))
    return found


EVERY = pytest.mark.parametrize("backend, device", targets())


def rule(x: Tensor, threshold: float) -> tuple[Tensor, tuple[float, float]]:
    """The threshold and the floor that determine the rank of x."""
    threshold_ = torch.tensor(threshold, dtype=torch.float64, device=x.device)
    return threshold_, reference.floor_of(x.dtype, "relative")


class Batch:
    """A whole batch, and the reference's results."""

    def __init__(self, x: Tensor, threshold: float, generator: torch.Generator) -> None:
        self.x, self.threshold = x, threshold
        self.grad = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x)
        fwd = reference.pca_reconstruct_fwd(x, *rule(x, threshold))
        self.reconstruction, self.rank, self.mean, *self.spectrum = fwd
        centred = x.double() - self.mean
        self.moment = centred.mT @ centred

    def decompose(self, threshold: float, backend: str) -> tuple[Tensor, ...]:
        saved = (self.moment, self.mean, len(self.x))
        return moment.decompose(*saved, *rule(self.x, threshold), backend)

    def decomposition(self) -> tuple[Tensor, ...]:
        return *self.spectrum, self.rank

    def gradient(self, gap_eps: float, constant: bool) -> Tensor:
        saved = (self.mean, *self.decomposition())
        return reference.pca_reconstruct_bwd(self.grad, self.x, *saved, gap_eps, not constant)

    def parts(self) -> list[slice]:
        return [slice(*pair) for pair in itertools.pairwise(CUTS)]

    def joined_reconstruction(self, backend: str) -> Tensor:
        saved = (self.mean, *self.decomposition())
        return torch.cat(
            [moment.reconstruct(self.x[part], *saved, backend) for part in self.parts()]
        )

    def joined_gradient(self, backend: str, gap_eps: float, constant: bool) -> Tensor:
        grad_mean = self.grad.double().mean(0)
        projectors = [
            moment.grad_projector(self.grad[part], self.x[part], self.mean, backend)
            for part in self.parts()
        ]
        whole = torch.stack(projectors).sum(0)
        symmetric = None if constant else whole + whole.mT
        found = []
        for part in self.parts():
            rows = (self.grad[part], grad_mean, self.x[part], self.mean)
            found.append(moment.bwd(*rows, symmetric, *self.decomposition(), gap_eps, backend))
        return torch.cat(found)


def power_law_batch(
    device: str, dtype: torch.dtype, threshold: float, generator: torch.Generator
) -> Batch:
    x = power_law(SAMPLES, FEATURES, dtype=dtype, generator=generator).to(device)
    return Batch(x, threshold, generator)


@EVERY
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_decomposition_of_a_moment(backend, device, threshold, generator):
    batch = power_law_batch(device, torch.float64, threshold, generator)
    kept = batch.moment.clone()
    eigenvalues, vectors, rank = batch.decompose(threshold, backend)
    assert torch.equal(batch.moment, kept)
    assert torch.equal(rank, batch.rank)
    assert relative_error(eigenvalues, batch.spectrum[0]) <= 1e-13
    identity = torch.eye(FEATURES, dtype=torch.float64, device=device)
    assert relative_error(vectors.mT @ vectors, identity) <= 1e-13
    assert relative_error(vectors * eigenvalues @ vectors.mT, batch.moment) <= 1e-13


@EVERY
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_put_together_are_those_of_the_batch(backend, device, threshold, dtype, generator):
    batch = power_law_batch(device, dtype, threshold, generator)
    found = batch.joined_reconstruction(backend)
    assert found.dtype == dtype
    assert threshold < 1 or torch.equal(found, batch.x)
    assert relative_error(found, batch.reconstruction) <= (
        1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    )


@EVERY
@BASIS
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.sample
def test_gradients_put_together_are_those_of_the_batch(
    backend, device, threshold, dtype, constant, generator
):
    batch = power_law_batch(device, dtype, threshold, generator)
    found = batch.joined_gradient(backend, 1e-6, constant)
    assert found.dtype == dtype
    assert threshold < 1 or torch.equal(found, batch.grad)
    assert relative_error(found, batch.gradient(1e-6, constant)) <= (
        1e-11 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    )


@EVERY
def test_directions_of_little_variance_are_kept(backend, device, generator):
    # The gradient of a whole batch uses that its centred rows sum to zero; a part's rows do not.
    x = power_law(SAMPLES, FEATURES, dtype=torch.float64, generator=generator)
    x = (x * torch.logspace(0, -5, FEATURES, dtype=torch.float64)).to(device)
    batch = Batch(x, 1 - 1e-9, generator)
    kept = batch.spectrum[0][: batch.rank]
    assert len(kept) < FEATURES and kept[-1] < 1e-8 * kept[0]
    assert relative_error(batch.joined_reconstruction(backend), batch.reconstruction) <= 1e-13
    found = batch.joined_gradient(backend, 1e-6, False)
    assert relative_error(found, batch.gradient(1e-6, False)) <= 1e-9


@EVERY
def test_the_gradient_of_the_projector(backend, device, generator):
    batch = power_law_batch(device, torch.float32, 0.9, generator)
    found = moment.grad_projector(batch.grad, batch.x, batch.mean, backend)
    expected = (batch.x.double() - batch.mean).mT @ batch.grad.double()
    assert found.dtype == torch.float64 and relative_error(found, expected) <= 1e-14


@EVERY
@BASIS
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.sample
def test_degenerate_batches_are_finite_and_those_of_the_reference(
    backend, device, name, constant, generator
):
    x = DEGENERATE[name](SAMPLES, FEATURES, generator=generator).to(device)
    batch = Batch(x, 0.9, generator)
    reconstruction = batch.joined_reconstruction(backend)
    assert reconstruction.isfinite().all()
    tolerance = 4 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(
        reconstruction, batch.reconstruction, rtol=tolerance, atol=tolerance * float(x.abs().max())
    )
    # A loose bound: at equal eigenvalues around the cut, weights of 1e6 amplify the order of sums.
    found, expected = (
        batch.joined_gradient(backend, 0.1, constant),
        batch.gradient(0.1, constant),
    )
    assert found.isfinite().all()
    scale = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)


@EVERY
def test_nan_gives_nan_and_no_error(backend, device, generator):
    batch = power_law_batch(device, torch.float64, 0.9, generator)
    batch.moment[2, 3] = torch.nan
    decomposition = batch.decompose(0.9, backend)
    assert all(value.isnan().all() for value in decomposition[:2])
    rows = (batch.x, batch.mean, *decomposition)
    assert moment.reconstruct(*rows, backend).isnan().all()
    symmetric = torch.zeros_like(batch.moment)
    found = moment.bwd(
        batch.grad, batch.mean, batch.x, batch.mean, symmetric, *decomposition, 1e-6, backend
    )
    assert found.isnan().all()


@EVERY
def test_strides_and_another_run(backend, device, generator):
    batch = power_law_batch(device, torch.float32, 0.9, generator)

    def run() -> tuple[Tensor, Tensor]:
        gradient = batch.joined_gradient(backend, 1e-6, False)
        return batch.joined_reconstruction(backend), gradient

    expected = run()
    assert all(map(torch.equal, run(), expected))
    batch.x, batch.grad = batch.x.mT.contiguous().mT, batch.grad[:1].expand(SAMPLES, -1)
    same_grad = batch.grad.contiguous()
    strided = run()
    batch.x, batch.grad = batch.x.contiguous(), same_grad
    for value, other in zip(strided, run(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)

"""pca and project_reconstruct: against NumPy's SVD, field by field, and their gradients."""

import numpy as np
import pytest
import torch

from himo_kernels import PCA, pca_reconstruct, project_reconstruct
from himo_kernels import pca as run_pca
from himo_kernels import testing as hkt

BACKENDS = hkt.runnable_backends("pca", interpreted=False)
per_backend = pytest.mark.parametrize("backend", BACKENDS)
per_projection_backend = pytest.mark.parametrize(
    "backend", hkt.runnable_backends("project_reconstruct")
)
per_shape = pytest.mark.parametrize(
    "shape", [(24, 9), (16, 16), (9, 24)], ids=["N>D", "N=D", "N<D"]
)


@per_backend
@per_shape
@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
def test_fields_against_numpy(backend, shape, threshold, generator):
    x = hkt.power_law(*shape, dtype=torch.float64, generator=generator)
    centred = x.numpy() - x.numpy().mean(0)
    _, singular_values, right = np.linalg.svd(centred, full_matrices=False)
    ratio = singular_values**2 / (singular_values**2).sum()
    rank = min(int((ratio.cumsum() < threshold - 1e-15).sum()) + 1, min(shape))

    p = run_pca(x, threshold, backend=backend)
    assert isinstance(p, PCA)
    assert p.rank.dtype == torch.int64
    if threshold < 1:  # at 1 the last directions are rounding noise
        assert p.rank == rank
    kept = min(int(p.rank), min(shape) - 1)
    torch.testing.assert_close(p.mean, x.mean(0))
    np.testing.assert_allclose(p.eigenvalues, singular_values**2, atol=1e-13)
    np.testing.assert_allclose(p.explained_variance_ratio, ratio, atol=1e-13)
    projector = p.components[:kept].mT @ p.components[:kept]
    np.testing.assert_allclose(projector, right[:kept].T @ right[:kept], atol=1e-9)
    torch.testing.assert_close(
        p.components[:kept] @ p.components[:kept].mT,
        torch.eye(kept, dtype=torch.float64),
        rtol=0,
        atol=1e-10,
    )
    assert (p.components[int(p.rank) :] == 0).all()
    assert p.components.shape == (min(shape), shape[1])


@per_backend
def test_tau_reached_exactly_keeps_no_further_component(backend):
    # X^T X = diag(18, 2): the first axis holds exactly 0.9.
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]], dtype=torch.float64)
    assert run_pca(x, 0.9, backend=backend).rank == 1
    assert run_pca(x, 0.9000001, backend=backend).rank == 2


def flowers(dtype, generator):
    """Rows with the means and the principal variances of the iris data, in cm: one is 0.92."""
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))
    spread = torch.tensor([4.228, 0.2427, 0.0782, 0.0238], dtype=torch.float64).sqrt()
    x = torch.randn(150, 4, dtype=torch.float64, generator=generator)
    x = torch.linalg.qr(x - x.mean(0))[0] * 149**0.5 * spread  # uncorrelated to the last digit
    return (x @ rotation + torch.tensor([5.843, 3.057, 3.758, 1.199])).to(dtype)


@per_backend
@pytest.mark.parametrize(
    "dtype, unit",
    [(torch.float32, u) for u in (1e-30, 1e-6, 1.0, 1e30)]
    + [(torch.float64, u) for u in (1e-140, 1e-6, 1.0, 1e140)]
    + [(torch.float16, 1e-3), (torch.bfloat16, 1e-30)],
    ids=str,
)
def test_the_rank_does_not_depend_on_the_unit(backend, dtype, unit, generator):
    x = flowers(torch.float64, generator)
    x = (x * unit).to(dtype)
    for rows in (x, x[:3]):  # on both sides
        p = run_pca(rows, backend=backend)
        plain = run_pca(rows.double() / unit, backend=backend)
        assert p.rank == plain.rank and (len(rows) == 3 or p.rank == 1)
        torch.testing.assert_close(
            p.explained_variance_ratio,
            plain.explained_variance_ratio.to(p.mean),
            rtol=1e-4,
            atol=1e-12,
        )
        assert pca_reconstruct(rows, backend=backend)[1] == p.rank


@per_backend
@pytest.mark.parametrize("samples", [2, 7, 5000, 100_000])
@pytest.mark.parametrize(
    "dtype, unit",
    [(torch.float32, u) for u in (1e-30, 1.0, 1e30)]
    + [(torch.float64, u) for u in (1e-150, 1e-6, 1.0, 1e100, 1e150)]
    + [(torch.float16, 100.0), (torch.bfloat16, 1.0)],
    ids=str,
)
def test_equal_rows_are_the_identity_in_any_unit(backend, samples, dtype, unit, generator):
    row = (unit * torch.randn(1, 5, dtype=torch.float64, generator=generator)).to(dtype)
    for x in (row.expand(samples, 5), row.mT.expand(5, samples).contiguous().mT):
        x = x.detach().requires_grad_()
        p = run_pca(x, backend=backend)
        reconstruction, rank = pca_reconstruct(x, backend=backend)
        assert p.rank == rank == min(samples, 5)
        assert (p.explained_variance_ratio == 0).all()
        assert torch.equal(reconstruction, x)
        (gradient,) = torch.autograd.grad(reconstruction, x, torch.ones_like(x))
        torch.testing.assert_close(gradient, torch.ones_like(x))


@per_backend
def test_a_floor_that_is_a_number_is_absolute(backend, generator):
    x = flowers(torch.float64, generator)
    trace = 149 * (4.228 + 0.2427 + 0.0782 + 0.0238)
    for unit in (1e-5, 1.0, 1e5):
        for side in (0.999, 1.001):
            floor = side * trace * unit**2
            rank = 1 if side < 1 else 4
            assert run_pca(x * unit, variance_floor=floor, backend=backend).rank == rank
            reconstructed = pca_reconstruct(x * unit, variance_floor=floor, backend=backend)
            assert reconstructed[1] == rank
    spread = 1e-9 * torch.eye(5, 7, dtype=torch.float64) + 1
    assert run_pca(spread, variance_floor=0, backend=backend).rank == 4


@per_backend
def test_a_tie_keeps_what_reaches_the_threshold(backend):
    # Shares of 1/2 and four times 1/8, which floating point holds exactly.
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    x = torch.block_diag(*(size * signs for size in (2.0, 1.0, 1.0, 1.0, 1.0)))
    shares = run_pca(x, backend=backend).explained_variance_ratio.cumsum(0)
    assert shares.tolist() == [0.5, 0.625, 0.75, 0.875, 1.0]
    for rank, tau in enumerate(shares[:-1].tolist(), 1):
        assert run_pca(x, tau, backend=backend).rank == rank
        assert run_pca(x, np.nextafter(tau, 1.0), backend=backend).rank == rank + 1
        # scikit-learn's line for PCA(n_components=tau): a share > tau, one component more.
        assert np.searchsorted(shares.numpy(), tau, side="right") + 1 == rank + 1


@per_backend
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtypes(backend, dtype, generator):
    p = run_pca(hkt.power_law(12, 20, dtype=dtype, generator=generator), backend=backend)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in p if t.is_floating_point()} == {expected}


@per_backend
@per_shape
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_gradcheck_of_what_does_not_depend_on_the_basis(backend, shape, threshold, generator):
    x = torch.randn(2, *shape, dtype=torch.float64, generator=generator).requires_grad_()

    def invariants(x):
        p = run_pca(x, threshold, gap_eps=0.0, backend=backend)
        return (
            p.mean,
            p.eigenvalues[..., :-1],  # the last is 0 where N <= D
            p.explained_variance_ratio[..., :-1],
            p.components.mT @ p.components,
        )

    assert torch.autograd.gradcheck(invariants, x, fast_mode=True)


@per_backend
@per_shape
def test_projector_gradient_against_autograd_through_svd(backend, shape, generator):
    x = hkt.power_law(*shape, exponent=2.0, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    weights = torch.randn(shape[1], shape[1], dtype=torch.float64, generator=generator)
    p = run_pca(x, 0.7, gap_eps=0.0, backend=backend)
    actual = torch.autograd.grad((p.components.mT @ p.components * weights).sum(), x)[0]
    _, _, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    kept = right[: int(p.rank)]
    expected = torch.autograd.grad((kept.mT @ kept * weights).sum(), x)[0]
    assert hkt.relative_error(actual, expected) <= 1e-10


@per_backend
@pytest.mark.parametrize("name", hkt.DEGENERATE)
@pytest.mark.parametrize("shape", [(40, 64), (64, 40)], ids=["N<D", "N>D"])
def test_degenerate_batches(backend, name, shape, generator):
    x = hkt.DEGENERATE[name](*shape, generator=generator).requires_grad_()
    for threshold in (0.5, 1.0):
        p = run_pca(x, threshold, backend=backend)
        sum(t.square().sum() for t in p if t.requires_grad).backward()
        assert all(t.isfinite().all() for t in p)
        assert x.grad.isfinite().all()
    if name in ("all rows equal", "zeros"):
        assert p.rank == min(shape) and (p.explained_variance_ratio == 0).all()


@per_backend
def test_non_finite_input_gives_nan(backend, generator):
    x = hkt.power_law(6, 9, batch=(2,), generator=generator)
    x[0, 1, 2] = torch.inf
    p = run_pca(x, backend=backend)
    for field in (p.eigenvalues, p.components, p.explained_variance_ratio):
        assert field[0].isnan().any() and field[1].isfinite().all()
    with pytest.raises(ValueError, match=r"pca: expected x to be finite, got inf at \[0, 1, 2\]"):
        run_pca(x, check_finite=True, backend=backend)


@per_projection_backend
@per_shape
def test_projection_of_new_samples(backend, shape, generator):
    p = run_pca(hkt.power_law(*shape, dtype=torch.float64, generator=generator), 0.7)
    new = torch.randn(5, shape[1], dtype=torch.float64, generator=generator)
    basis = p.components[: int(p.rank)]
    expected = (new - p.mean) @ basis.mT @ basis + p.mean
    actual = project_reconstruct(new, p, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    again = project_reconstruct(actual, p, backend=backend)
    torch.testing.assert_close(again, actual, rtol=0, atol=1e-12)
    first = project_reconstruct(new, p._replace(rank=torch.tensor(1)), backend=backend)
    basis = p.components[:1]
    expected = (new - p.mean) @ basis.mT @ basis + p.mean
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-13)


@per_projection_backend
@pytest.mark.parametrize("batch", [(), (2,), (2, 2)], ids=str)
@pytest.mark.sample
def test_projection_gradcheck(backend, batch, generator):
    def randn(*shape):
        return torch.randn(*batch, *shape, dtype=torch.float64, generator=generator)

    x, mean, components = randn(5, 4), randn(4), randn(3, 4)
    rank = torch.randint(1, 4, batch, generator=generator)
    ratio = torch.zeros(*batch, 3, dtype=torch.float64)
    for tensor in (x, mean, components):
        tensor.requires_grad_()

    def project(x, mean, components):
        p = PCA(mean, ratio, components, rank, ratio)
        return project_reconstruct(x, p, backend=backend)

    assert torch.autograd.gradcheck(project, (x, mean, components), fast_mode=True)


@per_projection_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_projection_within_budget(backend, dtype, generator):
    fitted = hkt.power_law(64, 123, dtype=dtype, generator=generator)
    x = hkt.power_law(37, 123, dtype=dtype, generator=generator)
    p = run_pca(fitted)
    mean, components = p.mean.double(), p.components.double()
    exact = (x.double() - mean) @ components.mT @ components + mean
    low = PCA(*(t.to(dtype) if t.is_floating_point() else t for t in p))
    eager = (x - low.mean) @ low.components.mT @ low.components + low.mean
    actual = project_reconstruct(x, p, backend=backend)
    assert actual.dtype == dtype
    hkt.assert_within_budget("project_reconstruct", actual, eager, exact, terms=123)

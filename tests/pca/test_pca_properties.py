"""Properties of HiDe that hold for every input, searched by hypothesis."""

import math

import pytest
import torch

from himo_kernels import pca as run_pca
from himo_kernels import pca_reconstruct
from himo_kernels import testing as hkt

hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis")
st = hypothesis.strategies

examples = hypothesis.settings(deadline=None)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
thresholds = st.sampled_from([0.3, 0.5, 0.85, 0.9, 0.99, 1.0])
seeds = st.integers(0, 2**31 - 1)
backends = st.sampled_from(hkt.runnable_backends("pca_reconstruct", interpreted=False))


@st.composite
def batches(draw):
    """float64 rows: random, with repeats, low-rank, scaled or shifted."""
    samples, features = draw(shapes)
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(samples, features, dtype=torch.float64, generator=generator)
    kind = draw(st.sampled_from(["random", "repeats", "low rank", "signs", "equal"]))
    if kind == "repeats":
        x = x[torch.randint(samples, (samples,), generator=generator)]
    elif kind == "low rank":
        x = x[:, :1] @ x[:1]
    elif kind == "signs":
        x = x.sign()
    elif kind == "equal":
        x = x[:1].repeat(samples, 1)
    scale = draw(st.sampled_from([1e-2, 1.0, 1e3]))
    return x * scale + draw(st.sampled_from([0.0, 1.0, -7.0])), generator


def decompose(x, threshold, backend):
    return (*pca_reconstruct(x, threshold, backend=backend), run_pca(x, threshold))


def magnitude(x):
    return float(x.abs().max()) + 1e-12


def well_separated(p, threshold):
    """Whether the cut is clear: no gap and no ratio within rounding of it."""
    rank, size = int(p.rank), p.eigenvalues.shape[-1]
    ratio = p.explained_variance_ratio.cumsum(-1)
    if rank == size:
        return (ratio[:-1] - threshold).abs().min() > 1e-9 if size > 1 else True
    gap = (p.eigenvalues[rank - 1] - p.eigenvalues[rank]) / p.eigenvalues[0]
    return bool(gap > 1e-4 and (ratio - threshold).abs().min() > 1e-9)


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_rank_and_values_are_in_range(batch, threshold, backend):
    x, _ = batch
    reconstruction, rank, p = decompose(x, threshold, backend)
    assert 1 <= rank <= min(x.shape)
    assert reconstruction.isfinite().all()
    assert (p.eigenvalues >= 0).all()
    assert (p.eigenvalues.diff() <= 0).all()


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_mean_is_kept(batch, threshold, backend):
    x, _ = batch
    reconstruction, _, _ = decompose(x, threshold, backend)
    torch.testing.assert_close(reconstruction.mean(0), x.mean(0), rtol=0, atol=1e-12 * magnitude(x))


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_kept_variance_is_the_sum_of_kept_eigenvalues(batch, threshold, backend):
    x, _ = batch
    reconstruction, rank, p = decompose(x, threshold, backend)
    variance = (reconstruction - x.mean(0)).square().sum()
    expected = p.eigenvalues[: int(rank)].sum()
    torch.testing.assert_close(
        variance, expected, rtol=1e-9, atol=1e-12 * magnitude(x) ** 2 * x.numel()
    )


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_kept_share_reaches_the_threshold_and_one_component_less_does_not(
    batch, threshold, backend
):
    x, _ = batch
    _, rank, p = decompose(x, threshold, backend)
    trace = p.eigenvalues.sum()
    hypothesis.assume(trace > 1e-6)
    assert p.eigenvalues[: int(rank)].sum() >= (threshold - 1e-12) * trace
    assert p.eigenvalues[: int(rank) - 1].sum() < (threshold + 1e-12) * trace


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_reconstruction_error_is_orthogonal_to_the_reconstruction(batch, threshold, backend):
    x, _ = batch
    reconstruction, _, _ = decompose(x, threshold, backend)
    kept = reconstruction - x.mean(0)
    inner = ((x - reconstruction) * kept).sum()
    assert abs(float(inner)) <= 1e-9 * magnitude(x) ** 2 * x.numel()


@examples
@hypothesis.given(batches(), backends)
def test_tau_one_is_the_identity(batch, backend):
    x, _ = batch
    reconstruction, _, _ = decompose(x, 1.0, backend)
    torch.testing.assert_close(reconstruction, x, rtol=0, atol=1e-7 * magnitude(x))


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_projection_is_idempotent_at_the_same_rank(batch, threshold, backend):
    x, _ = batch
    reconstruction, rank, p = decompose(x, threshold, backend)
    hypothesis.assume(p.eigenvalues[int(rank) - 1] > 1e-9 * p.eigenvalues[0])
    # All variance of the reconstruction lies in the kept components: tau = 1 keeps them.
    again, _, _ = decompose(reconstruction, 1.0, backend)
    torch.testing.assert_close(again, reconstruction, rtol=0, atol=1e-7 * magnitude(x))


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_permutation_of_rows_permutes_values_and_gradients(batch, threshold, backend):
    x, generator = batch
    _, _, p = decompose(x, threshold, backend)
    hypothesis.assume(well_separated(p, threshold))
    order = torch.randperm(len(x), generator=generator)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    outputs = []
    for rows, upstream in ((x, weights), (x[order], weights[order])):
        rows = rows.clone().requires_grad_()
        reconstruction, _ = pca_reconstruct(rows, threshold, backend=backend)
        outputs.append((reconstruction, *torch.autograd.grad(reconstruction, rows, upstream)))
    (values, gradients), (permuted_values, permuted_gradients) = outputs
    torch.testing.assert_close(permuted_values, values[order], rtol=0, atol=1e-9 * magnitude(x))
    torch.testing.assert_close(
        permuted_gradients, gradients[order], rtol=0, atol=1e-6 * magnitude(gradients)
    )


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_rotation_of_features_rotates_the_reconstruction(batch, threshold, backend):
    x, generator = batch
    reconstruction, rank, p = decompose(x, threshold, backend)
    hypothesis.assume(well_separated(p, threshold))
    features = x.shape[1]
    rotation, _ = torch.linalg.qr(
        torch.randn(features, features, dtype=torch.float64, generator=generator)
    )
    rotated, rotated_rank, _ = decompose(x @ rotation, threshold, backend)
    assert rotated_rank == rank
    torch.testing.assert_close(rotated, reconstruction @ rotation, rtol=0, atol=1e-9 * magnitude(x))


@examples
@hypothesis.given(batches(), thresholds, st.sampled_from([0.25, 2.0, 16.0]), backends)
def test_scaling_scales_values_and_leaves_rank_and_gradient(batch, threshold, factor, backend):
    x, generator = batch
    reconstruction, rank, p = decompose(x, threshold, backend)
    hypothesis.assume(p.eigenvalues.sum() * min(factor, 1) ** 2 > 1e-7)
    scaled, scaled_rank, _ = decompose(factor * x, threshold, backend)
    hypothesis.assume(well_separated(p, threshold))
    assert scaled_rank == rank
    torch.testing.assert_close(
        scaled, factor * reconstruction, rtol=0, atol=1e-9 * factor * magnitude(x)
    )
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    gradients = []
    for rows in (x, factor * x):
        rows = rows.clone().requires_grad_()
        output, _ = pca_reconstruct(rows, threshold, backend=backend)
        gradients.append(torch.autograd.grad(output, rows, weights)[0])
    torch.testing.assert_close(
        gradients[1], gradients[0], rtol=0, atol=1e-6 * magnitude(gradients[0])
    )


@examples
@hypothesis.given(batches(), thresholds, backends)
def test_gradient_of_the_mean_passes_unchanged(batch, threshold, backend):
    # Adding a vector to every row adds it to every output: column sums of dU equal those of G.
    x, generator = batch
    x = x.clone().requires_grad_()
    reconstruction, _ = pca_reconstruct(x, threshold, backend=backend)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(reconstruction, x, weights)[0]
    torch.testing.assert_close(
        gradients.sum(0), weights.sum(0), rtol=0, atol=1e-8 * (1 + magnitude(gradients))
    )


@examples
@hypothesis.given(batches(), thresholds, st.sampled_from([1e-6, 1e-4, 1e-2]), backends)
def test_gradient_bound(batch, threshold, gap_eps, backend):
    x, generator = batch
    x = x.clone().requires_grad_()
    reconstruction, _ = pca_reconstruct(x, threshold, gap_eps=gap_eps, backend=backend)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(reconstruction, x, weights)[0]
    assert math.isfinite(gradients.norm())
    assert gradients.norm() <= (3 + 1 / gap_eps) * weights.norm()

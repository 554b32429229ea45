"""Properties of centred moments that hold for every input, searched by hypothesis."""

import pytest
import torch

from himo_kernels import covariance, gram
from himo_kernels import testing as hkt

hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis")
st = hypothesis.strategies

examples = hypothesis.settings(deadline=None)
backends = st.sampled_from(hkt.runnable_backends("covariance"))


@st.composite
def batches(draw):
    """float64 rows of moderate size, with the generator that made them."""
    shape = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
    return x, generator


def tolerance(x):
    return 1e-12 * float(x.abs().max()) ** 2 * x.numel()


def assert_close(actual, expected, x):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance(x))


@examples
@hypothesis.given(batches(), backends)
def test_moments_are_symmetric_and_positive_semi_definite(batch, backend):
    x, _ = batch
    for moment in (covariance(x, backend=backend)[1], gram(x, backend=backend)[1]):
        assert_close(moment, moment.mT, x)
        assert torch.linalg.eigvalsh(moment).min() >= -tolerance(x)


@examples
@hypothesis.given(batches(), backends)
def test_both_sides_have_the_same_trace_and_norm(batch, backend):
    x, _ = batch
    features, samples = covariance(x, backend=backend)[1], gram(x, backend=backend)[1]
    assert_close(features.trace(), samples.trace(), x)
    torch.testing.assert_close(features.norm(), samples.norm(), rtol=1e-9, atol=tolerance(x))


@examples
@hypothesis.given(batches(), backends)
def test_a_common_shift_moves_the_mean_alone(batch, backend):
    x, generator = batch
    shift = torch.randn(x.shape[1], dtype=torch.float64, generator=generator) * x.abs().max()
    mean, moment = covariance(x, backend=backend)
    shifted_mean, shifted = covariance(x + shift, backend=backend)
    assert_close(shifted, moment, x + shift)
    assert_close(shifted_mean, mean + shift, x + shift)
    assert_close(gram(x + shift, backend=backend)[1], gram(x, backend=backend)[1], x + shift)


@examples
@hypothesis.given(batches(), backends)
def test_order_of_samples(batch, backend):
    x, generator = batch
    order = torch.randperm(len(x), generator=generator)
    assert_close(covariance(x[order], backend=backend)[1], covariance(x, backend=backend)[1], x)
    expected = gram(x, backend=backend)[1][order][:, order]
    assert_close(gram(x[order], backend=backend)[1], expected, x)


@examples
@hypothesis.given(batches(), backends)
def test_rows_of_gram_sum_to_zero(batch, backend):
    x, _ = batch
    sums = gram(x, backend=backend)[1].sum(0)
    assert_close(sums, torch.zeros_like(sums), x)


@examples
@hypothesis.given(batches(), backends)
def test_a_linear_map_of_features_maps_the_covariance(batch, backend):
    x, generator = batch
    linear = torch.randn(x.shape[1], 5, dtype=torch.float64, generator=generator)
    expected = linear.mT @ covariance(x, backend=backend)[1] @ linear
    mapped = covariance(x @ linear, backend=backend)[1]
    torch.testing.assert_close(
        mapped, expected, rtol=1e-9, atol=tolerance(x) * float(linear.norm()) ** 2
    )


@examples
@hypothesis.given(batches(), st.integers(1, 19), backends)
def test_two_parts_combine_to_the_whole(batch, cut, backend):
    # The pairwise update of counts, means and moments that ranks exchange.
    x, _ = batch
    hypothesis.assume(cut < len(x))
    (first_mean, first), (second_mean, second) = (
        covariance(part, backend=backend) for part in (x[:cut], x[cut:])
    )
    apart = second_mean - first_mean
    between = torch.outer(apart, apart) * cut * (len(x) - cut) / len(x)
    assert_close(first + second + between, covariance(x, backend=backend)[1], x)


@examples
@hypothesis.given(batches(), backends)
def test_gradient_of_a_moment_does_not_move_the_mean(batch, backend):
    x, generator = batch
    x = x.clone().requires_grad_()
    moment = covariance(x, backend=backend)[1]
    weights = torch.randn(moment.shape, dtype=torch.float64, generator=generator)
    gradient = torch.autograd.grad(moment, x, weights)[0]
    assert gradient.sum(0).abs().max() <= 1e-11 * float(x.detach().abs().max()) * x.numel()

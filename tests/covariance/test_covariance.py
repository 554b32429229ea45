"""covariance and gram on every backend: against NumPy, by hand, and in each dtype and layout."""

import numpy as np
import pytest
import torch

import himo_kernels
from himo_kernels import testing as hkt

OPERATORS = {"covariance": himo_kernels.covariance, "gram": himo_kernels.gram}
per_backend = pytest.mark.parametrize(
    "operator, backend",
    [(name, backend) for name in OPERATORS for backend in hkt.runnable_backends(name)],
)
SHAPES = [(64, 64), (252, 123), (5, 300), (1, 7), (9, 1), (513, 40), (3, 17, 6), (2, 2, 4, 9)]


def eager(x: torch.Tensor, operator: str) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.mean(-2)
    centred = x - mean.unsqueeze(-2)
    return mean, centred.mT @ centred if operator == "covariance" else centred @ centred.mT


@per_backend
def test_hand_worked_three_points(operator, backend):
    x = torch.tensor([[1.0, 0], [2, 0], [3, 6]])  # deviations (-1, -2), (0, -2), (1, 4)
    mean, moment = OPERATORS[operator](x, backend=backend)
    assert mean.tolist() == [2, 2]
    expected = {
        "covariance": [[2, 6], [6, 24]],
        "gram": [[5, 4, -9], [4, 4, -8], [-9, -8, 17]],
    }
    assert moment.tolist() == expected[operator]


@per_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_numpy_in_float64(operator, backend, shape, generator):
    x = torch.randn(shape, dtype=torch.float64, generator=generator) + 3
    mean, moment = OPERATORS[operator](x, backend=backend)
    np.testing.assert_allclose(mean, x.numpy().mean(-2), rtol=1e-13)
    centred = x.numpy() - x.numpy().mean(-2, keepdims=True)
    left, right = centred.swapaxes(-1, -2), centred
    expected = left @ right if operator == "covariance" else right @ left
    np.testing.assert_allclose(moment, expected, rtol=0, atol=1e-12 * max(shape))
    if operator == "covariance" and len(shape) == 2 and shape[0] > 1 and shape[1] > 1:
        np.testing.assert_allclose(
            moment / (shape[0] - 1), np.cov(x.numpy(), rowvar=False), rtol=0, atol=1e-12
        )


@per_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=["sums32", "sums64"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.sample
def test_values_and_gradient_within_budget(operator, backend, shape, dtype, sums, generator):
    x = torch.randn(shape, generator=generator).to(dtype)
    size = shape[-1] if operator == "covariance" else shape[-2]
    mean_weights = torch.randn(shape[-1], dtype=torch.float64, generator=generator)
    moment_weights = torch.randn(size, size, dtype=torch.float64, generator=generator)

    def run(x, compute):
        x = x.detach().requires_grad_()
        mean, moment = compute(x)
        loss = (mean * mean_weights.to(mean)).sum() + (moment * moment_weights.to(mean)).sum()
        return mean, moment, torch.autograd.grad(loss, x)[0]

    actual = run(x, lambda x: OPERATORS[operator](x, dtype=sums, backend=backend))
    exact = run(x.double(), lambda x: eager(x, operator))
    plain = run(x, lambda x: eager(x.to(sums), operator))
    assert actual[0].dtype == actual[1].dtype == sums and actual[2].dtype == dtype
    for name, a, p, e in zip(("mean", operator, "gradient"), actual, plain, exact, strict=True):
        hkt.assert_within_budget(name, a.detach(), p.detach(), e.detach(), terms=max(shape))


@per_backend
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (2, 5, 3)], ids=str)
@pytest.mark.sample
def test_gradcheck(operator, backend, shape, generator):
    x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OPERATORS[operator](x, backend=backend), x)


@per_backend
def test_float64_sums_of_float32_rows_keep_float64_digits(operator, backend, generator):
    # As a PCA needs: the moment of float32 rows, exact to float64 rounding.
    x = hkt.power_law(300, 123, generator=generator)
    exact = eager(x.double(), operator)[1]
    in_float64 = OPERATORS[operator](x, dtype=torch.float64, backend=backend)[1]
    in_float32 = OPERATORS[operator](x, backend=backend)[1]
    assert hkt.relative_error(in_float64, exact) < 1e-13
    assert 1e-9 < hkt.relative_error(in_float32, exact) < 1e-5


@per_backend
def test_both_sides_have_the_same_eigenvalues(operator, backend, generator):
    x = hkt.power_law(12, 7, dtype=torch.float64, generator=generator)
    _, moment = OPERATORS[operator](x, backend=backend)
    expected = torch.linalg.svdvals(x - x.mean(0)).square()
    torch.testing.assert_close(torch.linalg.eigvalsh(moment).flip(0)[:7], expected)


@per_backend
def test_layouts(operator, backend, generator):
    x = torch.randn(20, 33, generator=generator)
    expected = OPERATORS[operator](x, backend=backend)
    wide = torch.full((40, 66), torch.nan)
    wide[::2, 1::2] = x
    for view in (x.T.contiguous().T, wide[::2, 1::2], x.expand(3, 20, 33), x.flip(0).flip(0)):
        before = view.clone()
        actual = OPERATORS[operator](view, backend=backend)
        assert torch.equal(view, before)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e.expand_as(a), rtol=1e-5, atol=1e-5)


@per_backend
def test_expanded_gradient(operator, backend):
    # sum().backward() passes a gradient with stride 0.
    x = torch.arange(12.0).view(4, 3).requires_grad_()
    mean, moment = OPERATORS[operator](x, backend=backend)
    (mean.sum() + moment.sum()).backward()
    centred = x.detach() - x.detach().mean(0)
    if operator == "covariance":
        expected = 2 * centred.sum(1, keepdim=True).expand(4, 3) + 0.25
    else:  # the columns of X sum to zero
        expected = torch.full((4, 3), 0.25)
    torch.testing.assert_close(x.grad, expected)


@per_backend
def test_nan_flows_and_check_finite_raises(operator, backend, generator):
    x = torch.randn(2, 6, 5, generator=generator)
    x[1, 3, 2] = torch.nan
    mean, moment = OPERATORS[operator](x, backend=backend)
    assert moment[0].isfinite().all() and moment[1].isnan().any() and mean[1, 2].isnan()
    with pytest.raises(ValueError, match=rf"{operator}: expected x to be finite, got nan at"):
        OPERATORS[operator](x, check_finite=True, backend=backend)


@per_backend
def test_no_leading_problems(operator, backend):
    x = torch.empty(0, 4, 3, requires_grad=True)
    mean, moment = OPERATORS[operator](x, backend=backend)
    assert mean.shape == (0, 3) and moment.shape[0] == 0
    moment.sum().backward()
    assert x.grad.shape == x.shape


@per_backend
@pytest.mark.sample
def test_runs_are_bitwise_equal(operator, backend, generator):
    x = torch.randn(777, 65, generator=generator).requires_grad_()
    weights = torch.randn(1, generator=generator)
    first = OPERATORS[operator](x, backend=backend)[1]
    first_gradient = torch.autograd.grad((first * weights).sum(), x)[0]
    interpreted = backend == "triton" and x.device.type == "cpu"  # seconds per run
    for _ in range(1 if interpreted else 30):
        again = OPERATORS[operator](x, backend=backend)[1]
        assert torch.equal(again, first)
        assert torch.equal(torch.autograd.grad((again * weights).sum(), x)[0], first_gradient)


@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_of_one_backend_accepts_the_forward_of_another(operator, generator):
    x = torch.randn(30, 20, generator=generator)
    fwd = getattr(torch.ops.himo_kernels, f"{operator}_fwd")
    bwd = getattr(torch.ops.himo_kernels, f"{operator}_bwd")
    backends = hkt.runnable_backends(operator)
    results = []
    for forward in backends:
        mean, moment = fwd(x, torch.float64, forward)
        for backward in backends:
            results.append(bwd(mean, moment, x, mean, backward))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=["sums32", "sums64"])
def test_cuda_gives_what_the_cpu_gives(operator, sums, generator):
    x = torch.randn(3, 252, 123, generator=generator)
    expected = OPERATORS[operator](x, dtype=sums, backend="reference")
    actual = OPERATORS[operator](x.cuda(), dtype=sums)
    for a, e in zip(actual, expected, strict=True):
        assert a.is_cuda and hkt.relative_error(a.cpu(), e) <= 20 * torch.finfo(sums).eps

"""Triton backend tests that need a GPU: real sizes, no host sync, CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import himo_kernels
from himo_kernels import pca as run_pca
from himo_kernels import pca_reconstruct, project_reconstruct
from himo_kernels import testing as hkt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(128, 768), (8, 128, 768), (64, 16, 32), (768, 128), (4096, 96), (1000, 123)]
per_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
per_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    *leading, samples, features = shape
    return hkt.power_law(
        samples, features, batch=tuple(leading), dtype=dtype, device="cuda", generator=generator
    )


def reconstruct(x: Tensor, weights: Tensor, threshold: float, backend: str, **options):
    x = x.detach().requires_grad_()
    reconstruction, rank = pca_reconstruct(x, threshold, backend=backend, **options)
    return reconstruction.detach(), rank, torch.autograd.grad(reconstruction, x, weights)[0]


@per_shape
@per_dtype
def test_reconstruction_and_gradient_against_the_reference(shape, dtype, generator):
    x = batch(shape, dtype, generator)
    weights = torch.randn(shape, generator=generator).to(x)
    actual, rank, grad = reconstruct(x, weights, 0.9, "triton", gap_eps=0.0)
    expected, expected_rank, expected_grad = reconstruct(x, weights, 0.9, "reference", gap_eps=0.0)
    assert torch.equal(rank, expected_rank)
    eps = max(torch.finfo(dtype).eps, 1e-9)
    assert hkt.relative_error(actual, expected) <= eps
    assert hkt.relative_error(grad, expected_grad) <= 4 * eps


@pytest.mark.parametrize("name", hkt.DEGENERATE)
@pytest.mark.parametrize("shape", [(128, 256), (128, 128), (160, 96), (256, 64)], ids=str)
def test_degenerate_batches(name, shape, generator):
    x = hkt.DEGENERATE[name](*shape, device="cuda", generator=generator)
    weights = torch.randn(shape, generator=generator).cuda()
    for threshold in (0.5, 0.9, 1.0):
        actual, rank, grad = reconstruct(x, weights, threshold, "triton")
        assert actual.isfinite().all() and grad.isfinite().all()
        assert 1 <= rank <= min(shape)
    p = run_pca(x.double(), 1.0, backend="triton")
    expected = torch.linalg.svdvals((x.double() - x.double().mean(0)).cpu()).square()
    scale = float(expected.max().clamp(min=1e-8))
    torch.testing.assert_close(
        p.eigenvalues.cpu(), expected[: min(shape)], rtol=0, atol=1e-12 * scale
    )


@per_shape
def test_no_host_sync(shape, generator):
    x = batch(shape, torch.bfloat16, generator).requires_grad_()

    def step() -> Tensor:
        reconstruction, rank = pca_reconstruct(x, backend="triton")
        torch.autograd.grad(reconstruction, x, torch.ones_like(reconstruction))
        p = run_pca(x.detach(), backend="triton")
        project_reconstruct(x.detach(), p, backend="triton")
        for moment in (himo_kernels.covariance, himo_kernels.gram):
            mean, values = moment(x, backend="triton")
            (values.sum() + mean.sum()).backward()
        return rank

    step()  # compiles
    x.grad = None
    with no_host_sync():
        assert step().is_cuda


@pytest.mark.parametrize("shape", [(128, 768), (768, 128), (8, 128, 768)], ids=str)
def test_a_captured_graph_replays_on_new_values(shape, generator):
    x = batch(shape, torch.float32, generator)
    weights = torch.randn(shape, generator=generator).to(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        reconstruct(x, weights, 0.9, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = reconstruct(x, weights, 0.9, "triton")
    for values in (batch(shape, torch.float32, generator), hkt.one_hot_rows(*shape[-2:])):
        x.copy_(values.expand(shape))  # the second has another rank, and equal eigenvalues
        graph.replay()
        expected = reconstruct(x, weights, 0.9, "triton")
        assert all(map(torch.equal, captured, expected))


@per_shape
def test_runs_are_bitwise_equal(shape, generator):
    x = batch(shape, torch.float32, generator)
    weights = torch.randn(shape, generator=generator).to(x)
    first = reconstruct(x, weights, 0.9, "triton")
    for _ in range(20):
        assert all(map(torch.equal, reconstruct(x, weights, 0.9, "triton"), first))


def rule_of(moment: Tensor):
    from himo_kernels.pca.triton import eigensolver

    threshold = torch.tensor(0.9, dtype=torch.float64, device="cuda")
    return eigensolver.Rule(threshold, (0.0, 1e-8), torch.zeros_like(moment[:, 0]), 2)


@pytest.mark.parametrize("size", [96, 128])
def test_jacobi_agrees_with_the_certified_path(size, generator, monkeypatch):
    from himo_kernels.pca.triton import eigensolver

    x = torch.randn(4, size, 2 * size, dtype=torch.float64, generator=generator).cuda()
    moment = x @ x.mT
    values = eigensolver.solve(moment, rule_of(moment)).eigenvalues
    monkeypatch.setattr(eigensolver, "CERTIFIED", 0.0)
    again, vectors, _, _ = eigensolver.solve(moment, rule_of(moment))
    torch.testing.assert_close(again, values, rtol=0, atol=1e-12 * float(values.max()))
    identity = torch.eye(size, dtype=torch.float64, device="cuda")
    assert (vectors.mT @ vectors - identity).abs().max() <= 1e-12
    assert (moment @ vectors - vectors * again.unsqueeze(-2)).abs().max() <= 1e-12 * values.max()


def test_natural_batches_need_no_second_try(generator, monkeypatch):
    from himo_kernels.pca.triton import eigensolver

    x = batch((64, 128, 768), torch.float32, generator).double()
    moment = (x - x.mean(-2, keepdim=True)) @ (x - x.mean(-2, keepdim=True)).mT
    expected = eigensolver.solve(moment, rule_of(moment))
    monkeypatch.setattr(eigensolver, "SWEEPS", 0)  # the Jacobi retry would return unit vectors
    assert all(map(torch.equal, eigensolver.solve(moment, rule_of(moment)), expected))


@pytest.mark.parametrize("operator", [himo_kernels.covariance, himo_kernels.gram])
@pytest.mark.parametrize("shape", [(128, 768), (4, 1000, 123), (33, 5000)], ids=str)
@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=["sums32", "sums64"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_moments_within_budget(operator, shape, sums, dtype, generator):
    # float32 matmuls are three TF32 matmuls, which the interpreter does not emulate.
    x = torch.randn(shape, generator=generator).to("cuda", dtype)
    exact = operator(x.double(), backend="reference")
    plain = operator(x, dtype=sums, backend="reference")
    actual = operator(x, dtype=sums, backend="triton")
    for name, a, p, e in zip(("mean", "moment"), actual, plain, exact, strict=True):
        hkt.assert_within_budget(name, a, p, e, terms=max(shape))


@per_dtype
def test_projection_of_other_samples(dtype, generator):
    p = run_pca(batch((128, 768), dtype, generator), backend="triton")
    x = batch((300, 768), dtype, generator).requires_grad_()
    weights = torch.randn(x.shape, generator=generator).to(x)
    results = []
    for backend in ("triton", "reference"):
        values = project_reconstruct(x, p, backend=backend)
        results.append((values, *torch.autograd.grad(values, x, weights)))
    for actual, expected in zip(*results, strict=True):
        assert hkt.relative_error(actual, expected) <= 8 * torch.finfo(dtype).eps


def test_int64_offsets(generator):
    # The last problem starts past element 2^31.
    features = 96
    samples = 2**31 // features // 2 + 100
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.zeros(3, samples, features, dtype=torch.bfloat16, device="cuda")
    x[2] = torch.randn(samples, features, dtype=torch.bfloat16, device="cuda")
    _, moment = himo_kernels.covariance(x, backend="triton")
    assert (moment[:2] == 0).all()
    expected = torch.cov(x[2].float().T) * (samples - 1)
    assert hkt.relative_error(moment[2], expected) <= 1e-3  # sums of 11 million float32 terms

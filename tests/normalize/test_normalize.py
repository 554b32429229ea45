"""normalize on every backend: against F.normalize, by hand, and if squares over- or underflow."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fresh_process import run_python
from torch import Tensor

from himo_kernels import normalize
from himo_kernels import testing as hkt

# Triton's interpreter computes in NumPy, which warns of intended overflows and NaNs.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

BACKENDS = hkt.runnable_backends("normalize")
per_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(64, 64), (252, 123), (5, 300), (1, 7), (9, 1), (1, 1), (3, 17, 6), (2, 2, 4, 9)]


def rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    # Lengths from a hundredth to a hundred.
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    powers = torch.rand((*shape[:-1], 1), dtype=torch.float64, generator=generator)
    return (x * 10 ** (4 * powers - 2) / shape[-1] ** 0.5).to(dtype)


def both(compute: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of x for this incoming gradient."""
    x = x.detach().requires_grad_()
    y = compute(x)
    return y.detach(), torch.autograd.grad(y, x, grad.to(y.dtype))[0]


def ours(backend: str, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return both(lambda x: normalize(x, backend=backend), x, grad)


def exact(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return both(lambda x: F.normalize(x, dim=-1, eps=0.0), x.double(), grad.double())


@per_backend
def test_hand_worked_two_vectors(backend):
    x = torch.tensor([[3.0, 4], [-5, 12]], requires_grad=True)
    y = normalize(x, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [-5 / 13, 12 / 13]]))
    (grad,) = torch.autograd.grad(y, x, torch.tensor([[1.0, 0], [0, 13]]))
    # g . y is 0.6 and 12: (1, 0) - 0.6 (0.6, 0.8) over 5, (0, 13) - 12 / 13 (-5, 12) over 13.
    torch.testing.assert_close(grad, torch.tensor([[0.128, -0.096], [60 / 169, 25 / 169]]))


@pytest.mark.sample
@per_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_every_entry_against_torch_in_float64(backend, shape, dtype, generator):
    x, grad = (rows(shape, dtype, generator) for _ in range(2))
    actual = ours(backend, x, grad)
    # A gradient is the remainder of grad / |x|, at D = 1 zero. Seven rounded factors are 3.5 eps.
    whole = grad.double().norm(dim=-1, keepdim=True) / x.double().norm(dim=-1, keepdim=True)
    budget = 4 * torch.finfo(dtype).eps * shape[-1] ** 0.5
    for a, e, size in zip(actual, exact(x, grad), (1.0, whole), strict=True):
        assert a.dtype == dtype
        assert ((a - e).abs() <= budget * size).all()


@pytest.mark.sample
@per_backend
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] > 1], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_values_and_gradient_within_budget(backend, shape, dtype, generator):
    x, grad = rows(shape, dtype, generator), torch.randn(shape, generator=generator).to(dtype)
    actual = ours(backend, x, grad)
    plain = both(lambda x: F.normalize(x.float(), dim=-1).to(dtype), x, grad)
    for name, a, p, e in zip(("y", "gradient"), actual, plain, exact(x, grad), strict=True):
        assert a.dtype == dtype
        hkt.assert_within_budget(name, a, p, e, terms=shape[-1])


@pytest.mark.sample
@per_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_16_bit_results_are_rounded_once(backend, dtype, generator):
    x = rows((40, 150), dtype, generator)
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    actual = ours(backend, x, grad)
    info = torch.finfo(dtype)
    within_float32 = 32 * torch.finfo(torch.float32).eps  # more than 150 terms take
    for a, e, size in zip(
        actual,
        exact(x, grad),
        (1.0, grad.double().norm(dim=-1, keepdim=True) / x.double().norm(dim=-1, keepdim=True)),
        strict=True,
    ):
        rounding = (e.abs() * info.eps / 2).clamp(min=info.smallest_normal * info.eps / 2)
        assert ((a.double() - e).abs() <= rounding + within_float32 * size).all()


@per_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("length", [1.0, 0.5, 8.0])
def test_every_16_bit_number_is_read_and_rounded_to_even(backend, dtype, length):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.float().abs() < 2.0**120]  # g . x is a float32
    if backend == "triton":  # interpreted on a CPU
        numbers = numbers[::61]
    # dx of (l, 0) is (0, g / l), of (l, l, l, l) / 2 it is (3 g, -g, -g, -g) / 4 l: all exact in
    # float32, then rounded; many of the 3 g are ties.
    for row, factors in (([1.0, 0.0], [0.0, 1.0]), ([0.5] * 4, [0.75, -0.25, -0.25, -0.25])):
        x = torch.tensor(row, dtype=dtype).mul(length).expand(len(numbers), -1)
        grad = torch.zeros_like(x)
        grad[:, factors.index(max(factors))] = numbers
        _, actual = ours(backend, x, grad)
        expected = numbers.float()[:, None] * torch.tensor(factors) / length
        assert torch.equal(actual, expected.to(dtype))


@per_backend
@pytest.mark.parametrize("shape", [(5, 4), (1, 1), (2, 3, 7)], ids=str)
def test_gradcheck(backend, shape, generator):
    x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalize(x, backend=backend), x)


@per_backend
@per_dtype
def test_a_row_of_zeros_gives_zeros_and_gets_no_gradient(backend, dtype, generator):
    x = rows((6, 20), dtype, generator)
    grad = torch.randn(6, 20, generator=generator).to(dtype)
    rest = ours(backend, x, grad)
    x[1], x[4] = 0, -0.0
    grad[4] = torch.nan  # an incoming NaN
    for actual, expected in zip(ours(backend, x, grad), rest, strict=True):
        assert (actual[[1, 4]] == 0).all()
        assert torch.equal(actual[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


@per_backend
@per_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_that_is_not_finite_is_nan_and_no_other(backend, dtype, bad, generator):
    x = rows((4, 70), dtype, generator)
    grad = torch.randn(4, 70, generator=generator).to(dtype)
    rest = ours(backend, x, grad)
    for column in (0, 68):
        spoiled = x.clone()
        spoiled[2, column] = bad
        results = ours(backend, spoiled, grad)
        for actual, expected in zip(results, rest, strict=True):
            assert actual[2].isnan().all()
            assert torch.equal(actual[[0, 1, 3]], expected[[0, 1, 3]])


@per_backend
@per_dtype
def test_a_gradient_that_is_not_finite_spoils_its_row_alone(backend, dtype, generator):
    x = rows((4, 70), dtype, generator)
    x[2, 1:5] = 0  # 0 * inf is NaN
    grad = torch.randn(4, 70, generator=generator).to(dtype)
    _, rest = ours(backend, x, grad)
    for column in (0, 3, 68):
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoiled = grad.clone()
            spoiled[2, column] = bad
            _, actual = ours(backend, x, spoiled)
            assert not actual[2].isfinite().any()
            assert actual[2].isnan().all() or abs(bad) == torch.inf
            assert torch.equal(actual[[0, 1, 3]], rest[[0, 1, 3]])


@per_backend
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_neither_the_largest_nor_the_smallest_numbers_leave_the_dtype(backend, dtype, generator):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # subnormal
    signs = torch.randn(40, dtype=torch.float64, generator=generator).sign()
    for size, incoming in ((info.max, 1e4), (smallest, 1e-4), (info.smallest_normal, 1e-4)):
        if dtype != torch.float16:  # its range is too small for either
            incoming **= 7
        x = torch.stack([signs * size, signs * size, signs * 0, signs * 0])
        x[1, 1:] *= 0.3 if size == info.max else 4
        x[2, 7], x[3, 39] = size, -size
        x = x.to(dtype)
        grad = torch.randn(x.shape, dtype=torch.float64, generator=generator).mul(incoming)
        grad = grad.to(dtype)
        y, gradient = ours(backend, x, grad)
        exact_y, exact_gradient = exact(x, grad)
        fits = exact_gradient.abs() <= info.max
        hkt.assert_within_budget("y", y, exact_y.to(dtype), exact_y, terms=40)
        assert gradient[~fits].isinf().all()
        hkt.assert_within_budget(
            "gradient",
            gradient[fits],
            exact_gradient[fits].to(dtype),
            exact_gradient[fits],
            terms=40,
        )


@per_backend
@pytest.mark.parametrize("length, incoming", [(-27, -122), (-40, -110), (40, 100), (80, 120)])
def test_a_gradient_is_right_where_its_products_with_the_row_are_no_numbers(
    backend, length, incoming, generator
):
    x = torch.randn(4, 70, generator=generator)
    grad = torch.randn(4, 70, generator=generator)
    _, gradient = ours(backend, x * 2.0**length, grad * 2.0**incoming)
    _, expected = exact(x, grad)
    actual = gradient.double() * 2.0 ** (length - incoming)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@per_backend
@pytest.mark.parametrize(
    "dtype, one, others",
    [(torch.float32, -54.5, -63.5), (torch.float64, -498, -511.5), (torch.float64, -510, -511.5)],
    ids=str,
)
def test_squares_that_are_flushed_to_zero_count(backend, dtype, one, others, generator):
    # 4095 squares, each just below the normal numbers, and one above.
    x = torch.full((1, 4096), 2.0**others, dtype=dtype)
    x[0, 0] = 2.0**one
    grad = torch.randn(x.shape, dtype=dtype, generator=generator)
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that flushes subnormal numbers to zero")
    try:
        y, gradient = ours(backend, x, grad)
    finally:
        torch.set_flush_denormal(False)
    scale = 2.0**-one
    exact_y, exact_gradient = exact(x.double() * scale, grad)
    budget = 4 * torch.finfo(dtype).eps * x.shape[1] ** 0.5
    torch.testing.assert_close(y.double(), exact_y, rtol=budget, atol=0)
    size = float(exact_gradient.norm())
    torch.testing.assert_close(
        gradient.double() / scale, exact_gradient, rtol=0, atol=budget * size
    )


@per_backend
@pytest.mark.parametrize("exponent", [-1060, -1000, -600, -60, 60, 600, 1000])
def test_float64_rows_of_any_length_have_the_same_direction(backend, exponent, generator):
    x = torch.randint(1, 2**10, (5, 30), generator=generator).double() * 2.0**-4
    grad = torch.randn(5, 30, dtype=torch.float64, generator=generator)
    y, gradient = ours(backend, x, grad)
    half = 2.0 ** (exponent // 2)
    far, far_gradient = ours(backend, x * half * half, grad * half)
    torch.testing.assert_close(far, y, rtol=1e-14, atol=0)
    scale = float(gradient.abs().max())
    torch.testing.assert_close(far_gradient * half, gradient, rtol=1e-13, atol=1e-14 * scale)


@per_backend
@per_dtype
def test_rows_of_length_1_stay_as_they_are(backend, dtype):
    x = torch.eye(5, 33, dtype=dtype)
    x[2] *= -1
    assert torch.equal(normalize(x, backend=backend), x)


@per_backend
@per_dtype
def test_layouts(backend, dtype, generator):
    x = rows((20, 33), dtype, generator)
    grad = torch.randn(20, 33, generator=generator).to(dtype)
    expected = ours(backend, x, grad)
    wide = torch.full((40, 66), torch.nan, dtype=dtype)
    wide_grad = wide.clone()
    wide[::2, 1::2], wide_grad[::2, 1::2] = x, grad
    batch, batch_grad = x.expand(3, 20, 33), grad.expand(3, 20, 33)
    for view, incoming in (
        (x.T.contiguous().T, grad),
        (x, grad.T.contiguous().T),
        (wide[::2, 1::2], wide_grad[::2, 1::2]),
        (batch, batch_grad),
        (batch.transpose(0, 1), batch_grad.transpose(0, 1)),
        (torch._neg_view(-x), torch._neg_view(-grad)),
    ):
        before = view.clone()
        actual = ours(backend, view, incoming)
        assert torch.equal(view, before)
        for a, e in zip(actual, expected, strict=True):
            e = e.expand(3, 20, 33) if view.dim() == 3 else e
            e = e.transpose(0, 1) if view.shape[1] == 3 else e
            # The reference sums the columns of a transposed x in another order.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(a, e, rtol=4 * eps, atol=4 * eps * float(e.abs().max()))
            assert a.is_contiguous()


@per_backend
def test_expanded_gradient(backend):
    # sum().backward() passes a gradient with stride 0.
    x = torch.tensor([[3.0, 4]], requires_grad=True)
    normalize(x, backend=backend).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[(1 - 0.84) / 5, (1 - 1.12) / 5]]))


@per_backend
@per_dtype
def test_runs_and_numbers_of_threads_give_the_same_bits(backend, dtype, generator):
    interpreted = backend == "triton"  # on a CPU: a second a run
    samples = 20 if interpreted else 700  # of which a thread takes 252
    x = rows((samples, 65), dtype, generator)
    grad = torch.randn(samples, 65, generator=generator).to(dtype)
    first = ours(backend, x, grad)
    threads = torch.get_num_threads()
    try:
        for number in (threads,) if interpreted else (1, 2, 3):
            torch.set_num_threads(number)
            again = ours(backend, x, grad)
            assert all(map(torch.equal, again, first))
    finally:
        torch.set_num_threads(threads)


@per_backend
def test_rows_do_not_depend_on_their_neighbours(backend, generator):
    x = rows((37, 29), torch.float32, generator)
    expected = normalize(x, backend=backend)
    for row in (0, 5, 36):
        assert torch.equal(normalize(x[row : row + 1], backend=backend), expected[row : row + 1])


@per_dtype
def test_backward_of_one_backend_accepts_the_forward_of_another(dtype, generator):
    x = rows((30, 20), dtype, generator)
    grad = torch.randn(30, 20, generator=generator).to(dtype)
    fwd, bwd = torch.ops.himo_kernels.normalize_fwd, torch.ops.himo_kernels.normalize_bwd
    expected = exact(x, grad)
    for backend in BACKENDS:
        y, gradient = fwd(x, backend), bwd(grad, x, backend)
        torch.testing.assert_close(y, expected[0].to(dtype))
        torch.testing.assert_close(gradient, expected[1].to(dtype))


@per_backend
def test_the_features_are_all_that_is_kept(backend, generator):
    x = rows((12, 16), torch.bfloat16, generator).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        normalize(x, backend=backend)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


AGAINST_REFERENCE = """
import sys, torch, himo_kernels
fwd, bwd = torch.ops.himo_kernels.normalize_fwd, torch.ops.himo_kernels.normalize_bwd
generator = torch.Generator().manual_seed(int(sys.argv[1]))
worst = 0.0
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for features in (*range(1, 40), 64, 67, 131):  # registers of 2 to 16 entries, and remainders
        x, grad = (torch.randn(3, features, generator=generator).to(dtype) for _ in range(2))
        whole = grad.double().norm(dim=-1, keepdim=True) / x.double().norm(dim=-1, keepdim=True)
        y = fwd(x, "cpu") - fwd(x.double(), "reference")
        gradient = bwd(grad, x, "cpu") - bwd(grad.double(), x.double(), "reference")
        for error in (y, gradient / whole):
            worst = max(worst, float(error.abs().max()) / torch.finfo(dtype).eps)
print(torch.backends.cpu.get_cpu_capability(), worst)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the extension")
@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.slow
def test_narrower_instruction_sets(capability, generator):
    seed = str(generator.initial_seed())
    printed = run_python("-c", AGAINST_REFERENCE, seed, ATEN_CPU_CAPABILITY=capability).split()
    assert printed[0].lower() == capability
    assert float(printed[1]) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@per_dtype
@pytest.mark.parametrize("shape", [(252, 123), (64, 768), (3, 9000)], ids=str)
def test_cuda_gives_what_the_cpu_gives(shape, dtype, generator):
    x, grad = rows(shape, dtype, generator), torch.randn(shape, generator=generator).to(dtype)
    expected = ours("reference", x, grad)
    for backend in hkt.runnable_backends("normalize", "cuda"):
        actual = ours(backend, x.cuda(), grad.cuda())
        for a, e in zip(actual, expected, strict=True):
            assert a.is_cuda and hkt.relative_error(a.cpu(), e) <= 2 * torch.finfo(dtype).eps

"""The Triton backend of the PCA operators: its matmul, eigensolver, and results against reference.

Without a GPU the kernels run in Triton's interpreter, at half a second per eigenproblem. Shapes are
small, and each covers another path. test_pca_cuda.py has the tests that need a GPU.
"""

import pytest
import torch
from torch import Tensor

from himo_kernels import _triton, pca_reconstruct, project_reconstruct
from himo_kernels import pca as run_pca
from himo_kernels import testing as hkt
from himo_kernels.pca import reference

pytest.importorskip("triton", reason="needs Triton")
from himo_kernels.covariance.triton.matmul import matmul
from himo_kernels.pca.triton import eigensolver
from himo_kernels.pca.triton.weights import weigh_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.mark.skipif(
        DEVICE == "cpu" and not _triton.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
    # The interpreter computes in NumPy, which warns of intended overflows and NaNs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE)


def random_moments(problems: int, size: int, generator: torch.Generator) -> Tensor:
    x = randn(problems, size, size + 3, generator=generator)
    return x @ x.mT


def rule(problems: Tensor, threshold: float = 0.9) -> eigensolver.Rule:
    """How solve chooses the rank of these moments or eigenvalues: a floor of 1e-8, a mean of 0."""
    threshold_ = torch.tensor(threshold, dtype=torch.float64, device=DEVICE)
    mean = torch.zeros(len(problems), 3, dtype=torch.float64, device=DEVICE)
    return eigensolver.Rule(threshold_, (0.0, 1e-8), mean, 2)


def eigenpairs(moment: Tensor) -> tuple[Tensor, Tensor]:
    return eigensolver.solve(moment, rule(moment))[:2]


def check_eigenpairs(moment: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Asserts order, orthonormality, residual and LAPACK's eigenvalues, to rounding."""
    size = moment.shape[-1]
    scale = moment.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300)
    tolerance = 1e-14 * (size + 4)
    assert (values >= 0).all() and (values.diff() <= 0).all()
    identity = torch.eye(size, dtype=torch.float64, device=moment.device)
    assert (vectors.mT @ vectors - identity).abs().max() <= tolerance
    residual = (moment @ vectors - vectors * values.unsqueeze(-2)) / scale
    assert residual.abs().max() <= tolerance
    expected = torch.linalg.eigvalsh(moment).flip(-1).clamp(min=0)
    assert ((values - expected) / scale.squeeze(-1)).abs().max() <= tolerance


# The product.


@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("limited", ["none", "rows", "columns", "inner"])
@pytest.mark.parametrize("limit", [0, 3, 70, 200])
@pytest.mark.sample
def test_product_ends_at_the_limit_and_touches_nothing_past_it(limited, limit, sums, generator):
    rows, inner, columns = 75, 90, 70
    a, b = randn(2, rows, inner, generator=generator), randn(2, inner, columns, generator=generator)
    a, b = a.to(sums), b.to(sums)
    mean = randn(2, inner, generator=generator)
    ranks = torch.tensor([limit, 5], device=DEVICE)
    out = torch.full((4, rows, columns), 7.0, dtype=sums, device=DEVICE)
    expected = ((a.double() - mean.unsqueeze(-2)) @ b.double()).to(sums)
    for problem, rank in enumerate(ranks.tolist()):
        if limited == "rows":
            expected[problem, rank:] = 7
        elif limited == "columns":
            expected[problem, :, rank:] = 7
        elif limited == "inner":
            left = a[problem, :, :rank].double() - mean[problem, :rank]
            expected[problem] = left @ b[problem, :rank].double()
            a[problem, :, rank:] = torch.nan  # entries past the limit must not affect a sum
            b[problem, rank:] = torch.nan
    options = {} if limited == "none" else {"limited": limited, "limit": ranks}
    matmul(a, b, sums, mean=mean, a_mean="inner", out=out[1:3], **options)
    tolerance = 1e-11 if sums == torch.float64 else 1e-3
    torch.testing.assert_close(out[1:3], expected, rtol=0, atol=tolerance)
    assert (out[0] == 7).all() and (out[3] == 7).all()


@pytest.mark.slow
def test_product_in_parts_is_symmetric_to_the_last_bit_and_repeats(generator):
    x = randn(600, 260, generator=generator).unsqueeze(0)  # 5 tiles per side, split into 3 parts
    mean = x.mean(-2)
    first, again = (
        matmul(x.mT, x, torch.float64, mean=mean, a_mean="rows", b_mean="columns", symmetric=True)
        for _ in range(2)
    )
    centred = x - mean
    torch.testing.assert_close(first, centred.mT @ centred, rtol=0, atol=1e-10)
    assert torch.equal(first, first.mT) and torch.equal(first, again)


def test_a_symmetric_product_is_its_lower_half_also_on_tiles_of_the_diagonal(generator):
    # Of a product that is not symmetric: its upper half must not appear anywhere.
    a, b = randn(1, 200, 20, generator=generator), randn(1, 20, 200, generator=generator)
    lower = (a @ b).tril()
    actual = matmul(a, b, torch.float64, symmetric=True)
    torch.testing.assert_close(actual, lower + lower.tril(-1).mT, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_product_with_factors_into_a_part_of_a_tensor(generator):
    a, b = randn(2, 70, 20, generator=generator), randn(2, 20, 66, generator=generator)
    add = randn(2, 70, 66, generator=generator)
    out = torch.full((2, 3, 70, 66), 7.0, dtype=torch.float64, device=DEVICE)
    result = matmul(a, b, torch.float64, add=add, alpha=-0.5, beta=1.5, out=out[:, 1])
    torch.testing.assert_close(result, 1.5 * add - 0.5 * (a @ b), rtol=0, atol=1e-12)
    assert result.data_ptr() == out[:, 1].data_ptr()
    assert (out[:, ::2] == 7).all()


@pytest.mark.parametrize("limit", [0, 3, 68, 100])
def test_rows_of_what_is_added_end_at_the_limit(limit, generator):
    a, b = randn(2, 70, 20, generator=generator), randn(2, 20, 9, generator=generator)
    add = randn(2, 70, 9, generator=generator)
    expected = a @ b
    for problem, rank in enumerate((limit, 5)):
        expected[problem, :rank] += add[problem, :rank]
        add[problem, rank:] = torch.nan
    limits = torch.tensor([limit, 5], device=DEVICE)
    actual = matmul(a, b, torch.float64, add=add, limited="add", limit=limits)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_product_rounds_to_bfloat16_once(generator):
    a, b = randn(1, 20, 20, generator=generator), randn(1, 20, 20, generator=generator)
    out = torch.empty(1, 20, 20, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(matmul(a, b, torch.float64, out=out), (a @ b).float().bfloat16())


# The weights.


@pytest.mark.parametrize("rank", [1, 5, 33, 40])
def test_symmetric_weights_are_those_of_both_orders(rank, generator):
    # 40 columns are two tiles per side: a tile with its mirror image, and one crossed by the cut.
    values = randn(2, 40, generator=generator).square().sort(-1, descending=True).values
    products = randn(2, 40, 40, generator=generator)
    ranks = torch.tensor([rank, 7], device=DEVICE)
    expected = products + products.mT
    weigh_pairs(expected, values, ranks, 1e-3)
    for problem, kept in enumerate(ranks.tolist()):
        expected[problem, kept:] = 0
    weigh_pairs(products, values, ranks, 1e-3, symmetric=True)
    torch.testing.assert_close(products, expected + expected.mT, rtol=1e-13, atol=0)


# The eigensolver.


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 33])
@pytest.mark.sample(3)
def test_eigenpairs_of_random_matrices(size, generator):
    moment = random_moments(2, size, generator)
    check_eigenpairs(moment, *eigenpairs(moment.clone()))


@pytest.mark.slow
def test_eigenpairs_at_the_largest_size(generator):
    x = hkt.power_law(128, 200, dtype=torch.float64, device=DEVICE, generator=generator)
    moment = ((x - x.mean(0)) @ (x - x.mean(0)).T).unsqueeze(0)
    check_eigenpairs(moment, *eigenpairs(moment.clone()))


@pytest.mark.parametrize("name", hkt.DEGENERATE)
@pytest.mark.sample(3)
def test_eigenpairs_of_degenerate_batches(name, generator):
    x = hkt.DEGENERATE[name](20, 9, dtype=torch.float64, device=DEVICE, generator=generator)
    x = x - x.mean(0)
    moments = [x.T @ x] + ([x @ x.T] if name in ("4 labels", "one-hot rows") else [])
    for moment in moments:
        check_eigenpairs(moment[None], *eigenpairs(moment[None].clone()))


@pytest.mark.slow
def test_a_graded_spectrum_and_a_matrix_of_blocks(generator):
    graded = randn(12, 14, generator=generator) * 10 ** torch.linspace(0, -9, 14, device=DEVICE)
    blocks = torch.block_diag(*random_moments(4, 3, generator))
    blocks[6:9, 6:9] = blocks[:3, :3]  # each eigenvalue twice, in separate blocks
    for moment in (graded @ graded.T, blocks):
        check_eigenpairs(moment[None], *eigenpairs(moment[None].clone()))


@pytest.mark.parametrize("scale", [1e-290, 1e290, 0.0])
def test_no_scale_is_out_of_range(scale, generator):
    moment = random_moments(1, 5, generator) / 100 * scale
    check_eigenpairs(moment, *eigenpairs(moment.clone()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.sample(3)
def test_a_matrix_that_is_not_finite_spoils_no_other(bad, generator):
    moment = random_moments(3, 6, generator)
    moment[1, 2, 3] = bad
    values, vectors = eigenpairs(moment.clone())
    assert values[1].isnan().all() and vectors[1].isnan().all()
    check_eigenpairs(moment[::2], values[::2], vectors[::2])


@pytest.mark.slow
def test_rotations_solve_what_is_not_certified(generator):
    moment = random_moments(4, 7, generator)
    moment[2] = torch.eye(7)
    pairs, products, scale = eigensolver._approximate(moment, 16)
    pairs[0, 0] = randn(7, 7, generator=generator)  # not eigenvectors
    products[2] += 1e-6
    approximate = pairs[:, 0].clone()
    values, vectors, _, _ = eigensolver._finish(pairs, products, scale, rule(moment), 16)
    check_eigenpairs(moment, values, vectors)
    for problem in (1, 3):  # certified: the vectors are unchanged
        order = (vectors[problem].T @ approximate[problem].T).abs().argmax(-1)
        assert torch.equal(vectors[problem], approximate[problem].T[:, order])


@pytest.mark.parametrize("name", ["power law", "2 duplicate pairs", "4 labels", "one-hot rows"])
@pytest.mark.sample(1)
def test_batches_are_certified(name, generator, monkeypatch):
    monkeypatch.setattr(eigensolver, "SWEEPS", 0)  # the Jacobi retry would return unit vectors
    create = hkt.power_law if name == "power law" else hkt.DEGENERATE[name]
    x = create(24, 40, dtype=torch.float64, device=DEVICE, generator=generator)
    moment = ((x - x.mean(0)) @ (x - x.mean(0)).T)[None]
    check_eigenpairs(moment, *eigenpairs(moment))


@pytest.mark.slow
def test_all_problems_by_rotations(generator, monkeypatch):
    monkeypatch.setattr(eigensolver, "CERTIFIED", 0.0)
    for problems, size in ((2, 1), (2, 6), (1, 17)):  # the interpreter takes 40 s for one of 17
        moment = random_moments(problems, size, generator)
        check_eigenpairs(moment, *eigenpairs(moment.clone()))


def test_rank():
    values = torch.tensor(
        [[18.0, 2, 0], [5, 5, 5], [0, 0, 0], [torch.nan] * 3, [1e-9, 0, 0]],
        dtype=torch.float64,
        device=DEVICE,
    )
    for threshold, expected in {
        0.5: [1, 2, 3, 3, 3],
        0.9: [1, 3, 3, 3, 3],
        0.90001: [2, 3, 3, 3, 3],
        1.0: [2, 3, 3, 3, 3],
    }.items():
        rank, complete = eigensolver.choose_rank(values, rule(values, threshold))
        assert rank.tolist() == expected
        assert complete.tolist() == [False, threshold > 0.5, True, False, True]
    # The solver chooses it too, bitwise equal in float64.
    moment = torch.diag(torch.tensor([0.25, 0.125, 0.625], dtype=torch.float64, device=DEVICE))
    above = 0.875 + 2.0**-52
    for threshold, expected in ((0.625, 1), (0.875, 2), (above, 3), (1.0, 3)):
        solution = eigensolver.solve(moment[None], rule(moment[None], threshold))
        assert solution.rank.tolist() == [expected]
        assert solution.complete.tolist() == [expected == 3]


@pytest.mark.slow
def test_the_floor_is_that_of_the_reference():
    # Problems on both sides of each floor; D = 37 is more than one block of the kernel's loop.
    values = torch.tensor([[1e-10, 0, 0], [1e-12, 0, 0], [3e-14, 0, 0], [0, 0, 0]]).double()
    mean = torch.full((4, 37), 0.1, dtype=torch.float64)
    threshold = torch.tensor(0.9, dtype=torch.float64)
    for floor, varies in (((1e-12, 0.0), [1, 0, 0, 0]), ((0.0, 2e-14), [1, 1, 1, 0])):
        expected = reference.has_variance(values.sum(-1), mean, 5, floor)
        assert expected.tolist() == [bool(v) for v in varies]
        settings = eigensolver.Rule(threshold.to(DEVICE), floor, mean.to(DEVICE), 5)
        rank, _ = eigensolver.choose_rank(values.to(DEVICE), settings)
        assert (rank == 1).tolist() == expected.tolist()
        moment = torch.diag_embed(values).to(DEVICE)
        assert torch.equal(eigensolver.solve(moment, settings).rank, rank)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=["N>D", "N<D"])
def test_rows_in_a_small_unit(shape, generator):
    x = 1e-6 * randn(*shape, generator=generator).float()
    for rows in (x, 1e6 * x, x[:1].expand(shape)):
        ranks = [pca_reconstruct(rows, 0.7, backend=name)[1] for name in ("triton", "reference")]
        assert ranks[0] == ranks[1]
    assert ranks[0] == min(shape)


# The operators, against the reference.


def run_reconstruct(x: Tensor, weights: Tensor, threshold: float, backend: str, **options):
    x = x.detach().requires_grad_()
    reconstruction, rank = pca_reconstruct(x, threshold, backend=backend, **options)
    return reconstruction.detach(), rank, torch.autograd.grad(reconstruction, x, weights.to(x))[0]


CASES = [
    ((6, 11), 0.7, torch.float32),
    ((11, 6), 0.7, torch.float32),
    ((7, 7), 0.9, torch.float64),
    ((2, 2, 4, 9), 0.6, torch.float64),
    ((3, 9, 4), 0.6, torch.float16),
    ((5, 33), 0.9, torch.bfloat16),
    ((1, 6), 0.9, torch.float32),
    ((6, 1), 0.9, torch.float32),
    ((8, 5), 1.0, torch.float64),
    ((5, 8), 1.0, torch.float32),
    ((130, 140), 0.9, torch.float32),  # n > 128: torch's eigensolver
]


@pytest.mark.parametrize("shape, threshold, dtype", CASES, ids=str)
@pytest.mark.sample(3)
def test_reconstruction_and_gradient(shape, threshold, dtype, generator):
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    weights = torch.randn(shape, generator=generator).to(DEVICE)
    for differentiate_basis in (True, False) if shape in ((6, 11), (11, 6)) else (True,):
        options = {"gap_eps": 0.0, "differentiate_basis": differentiate_basis}
        actual, rank, grad = run_reconstruct(x, weights, threshold, "triton", **options)
        expected, expected_rank, expected_grad = run_reconstruct(
            x, weights, threshold, "reference", **options
        )
        assert actual.dtype == grad.dtype == dtype
        if threshold < 1:  # at 1 the last directions are rounding noise
            assert torch.equal(rank, expected_rank)
        eps = max(torch.finfo(dtype).eps, 1e-11)
        assert hkt.relative_error(actual, expected) <= eps
        assert hkt.relative_error(grad, expected_grad) <= 4 * eps


@pytest.mark.parametrize(
    "name", ["2 duplicate pairs", "4 labels", "all rows equal", "one-hot rows"]
)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=["N<D", "N>D"])
@pytest.mark.sample(2)
def test_degenerate_batches_are_finite(name, shape, generator):
    x = hkt.DEGENERATE[name](*shape, device=DEVICE, generator=generator)
    weights = torch.randn(shape, generator=generator).to(DEVICE)
    actual, rank, grad = run_reconstruct(x, weights, 0.8, "triton")
    assert actual.isfinite().all() and grad.isfinite().all()
    assert 1 <= rank <= 8
    if name == "all rows equal":
        assert torch.equal(actual, x) and rank == 8
        torch.testing.assert_close(grad, weights)


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6)], ids=["N<D", "N>D"])
@pytest.mark.sample(1)
def test_nan_stays_in_its_problem(shape, generator):
    x = torch.randn(shape, generator=generator).to(DEVICE)
    clean, clean_rank, clean_grad = run_reconstruct(x, x, 0.8, "triton")
    weights = x.clone()
    x[1, 2, 3] = torch.nan
    actual, rank, grad = run_reconstruct(x, weights, 0.8, "triton")
    assert actual[1].isnan().all() and grad[1].isnan().all()
    for other in (0, 2):
        assert torch.equal(actual[other], clean[other]) and rank[other] == clean_rank[other]
        assert torch.equal(grad[other], clean_grad[other])


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=["N<D", "N>D"])
@pytest.mark.sample(1)
def test_layouts_and_repeats(shape, generator):
    x = torch.randn(shape, generator=generator).to(DEVICE)
    weights = torch.randn(shape, generator=generator).to(DEVICE)
    expected = run_reconstruct(x, weights, 0.8, "triton")
    wide = torch.full((2 * shape[0], 2 * shape[1]), torch.nan, device=DEVICE)
    wide[::2, 1::2] = x
    for view in (x, x.T.contiguous().T, wide[::2, 1::2]):
        before = view.clone()
        actual = run_reconstruct(view, weights, 0.8, "triton")
        assert torch.equal(view, before)
        # Strides may change the order of the mean's sums; the same input gives the same bits.
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e) if view is x else torch.allclose(a, e, atol=1e-6)


def test_projection_by_a_strided_mean_and_an_expanded_rank(generator):
    x = randn(3, 6, 10, generator=generator).requires_grad_()
    p = run_pca(x.detach(), 0.8, backend="reference")
    mean = torch.stack([p.mean, -p.mean], dim=-1)[..., 0]
    rank = torch.tensor([9, 2, 9], device=DEVICE)[1:2].expand(3)
    results = []
    for backend in ("triton", "reference"):
        projected = project_reconstruct(x, p._replace(mean=mean, rank=rank), backend=backend)
        (grad,) = torch.autograd.grad(projected.square().sum(), x)
        results.append((projected.detach(), grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=["N<D", "N>D"])
def test_backward_of_one_backend_accepts_the_forward_of_another(shape, generator):
    x = torch.randn(shape, generator=generator).to(DEVICE)
    weights = torch.randn(shape, generator=generator).to(DEVICE)
    fwd = torch.ops.himo_kernels.pca_reconstruct_fwd
    bwd = torch.ops.himo_kernels.pca_reconstruct_bwd
    grads = []
    for forward in ("triton", "reference"):
        _, rank, *saved = fwd(
            x, torch.tensor(0.8, dtype=torch.float64, device=DEVICE), (0.0, 0.0), forward
        )
        for backward in ("triton", "reference"):
            grads.append(bwd(weights, x, *saved, rank, 1e-6, True, backward))
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-6, atol=1e-6)


# At tau = 1 rounding decides whether a direction of no variance is kept; gap_eps is relative to it.
@pytest.mark.parametrize(("threshold", "gap_eps"), [(0.6, 0.0), (0.6, 1e-2), (1.0, 0.0)])
@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 10, 6), (7, 7)], ids=str)
@pytest.mark.sample(3)
def test_pca_and_its_gradient(shape, threshold, gap_eps, generator):
    x = randn(*shape, generator=generator)
    results = []
    for backend in ("triton", "reference"):
        fitted = x.clone().requires_grad_()
        p = run_pca(fitted, threshold, gap_eps=gap_eps, backend=backend)
        projector = p.components.mT @ p.components
        outputs = (p.mean, p.eigenvalues, p.explained_variance_ratio, projector)
        draw = torch.Generator().manual_seed(3)
        grads = [randn(*output.shape, generator=draw) for output in outputs]
        grad = torch.autograd.grad(outputs, fitted, grads)[0]
        results.append((*(output.detach() for output in outputs), grad))
        if threshold < 1:
            results[-1] += (p.rank,)
            past = torch.arange(p.components.shape[-2], device=DEVICE) >= p.rank.unsqueeze(-1)
            assert (p.components[past] == 0).all()
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

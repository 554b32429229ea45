"""csrc/cuda/symmetric_eigen.cu on the host, under sanitizers, against LAPACK on hard matrices."""

import emulated
import pytest
import torch
from hard_matrices import MATRICES, gaussian
from torch import Tensor

import himo_kernels.testing as hkt
from himo_kernels.pca import reference

pytestmark = [
    pytest.mark.slow,  # the kernel is compiled with sanitizers first
    pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not())),
]

EPS = torch.finfo(torch.float64).eps


def solve(matrices: Tensor, sanitizer: str = "address", **options: object) -> emulated.Solution:
    return emulated.solve(emulated.build(emulated.SOLVER, sanitizer), matrices, **options)


def assert_solved(matrix: Tensor, eigenvalues: Tensor, vectors: Tensor) -> None:
    # The contract of the solver in C++: tests/pca/test_pca_cpu_eigensolver.py.
    unit = torch.clamp(matrix.abs().max(), min=1e-300)
    matrix, eigenvalues = matrix / unit, eigenvalues / unit
    n = len(matrix)
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    tolerance = 8 * n * EPS * max(1.0, float(exact.abs().max()))
    assert bool((eigenvalues[:-1] >= eigenvalues[1:]).all())
    assert float((eigenvalues - exact).abs().max()) <= tolerance
    residual = matrix @ vectors - vectors * eigenvalues
    assert float(residual.abs().max()) <= tolerance
    assert float((vectors.mT @ vectors - torch.eye(n).double()).abs().max()) <= 4 * n * EPS


def hard_matrices(n: int, generator: torch.Generator) -> Tensor:  # [P, n, n]
    factors = [make(n, generator) for make in MATRICES.values()]
    return torch.stack([x.mT @ x for x in factors])


# Around the sizes that the kernel is compiled for: 32, 64 and 128.
@pytest.mark.parametrize("n", [20, 2, 33, 128, 3, 64, 65])
def test_hard_matrices(n, generator):
    matrices = hard_matrices(n, generator)
    found = solve(matrices)
    assert found.certified.tolist() == [1] * len(matrices)
    assert found.rank.tolist() == [n] * len(matrices)
    for matrix, eigenvalues, vectors in zip(
        matrices, found.eigenvalues, found.vectors, strict=True
    ):
        assert_solved(matrix, eigenvalues, vectors)


def test_one_by_one():
    found = solve(torch.tensor([[[-3.0]], [[0.0]], [[1e-300]]]))
    assert found.eigenvalues.flatten().tolist() == pytest.approx([-3.0, 0.0, 1e-300], rel=4 * EPS)
    assert found.vectors.abs().flatten().tolist() == pytest.approx([1.0, 1.0, 1.0], rel=4 * EPS)


def test_an_indefinite_matrix(generator):
    matrix = torch.randn(1, 50, 50, dtype=torch.float64, generator=generator)
    matrix = matrix + matrix.mT
    found = solve(matrix)
    assert found.certified.tolist() == [1]
    assert_solved(matrix[0], found.eigenvalues[0], found.vectors[0])


def test_batches_of_captions(generator):
    # The moments of HiDe: N x N for N <= D.
    batches = [
        make(48, 96, dtype=torch.float64, generator=generator)
        for make in (hkt.power_law, *hkt.DEGENERATE.values())
    ]
    x = torch.stack(batches)
    x = x - x.mean(-2, keepdim=True)
    matrices = x @ x.mT
    found = solve(matrices)
    assert found.certified.tolist() == [1] * len(batches)
    for matrix, eigenvalues, vectors in zip(
        matrices, found.eigenvalues, found.vectors, strict=True
    ):
        assert_solved(matrix, eigenvalues, vectors)


# ThreadSanitizer holds a state for each of the 512 threads of each matrix.
@pytest.mark.parametrize(
    ("n", "names"),
    [
        (20, ("gaussian", "duplicates", "zero")),
        (128, ("glued",)),
        (64, ("one-hot", "graded")),
        (1, ("gaussian", "zero")),
        (128, ("identity",)),
    ],
)
def test_no_thread_races(n, names, generator):
    factors = [MATRICES[name](n, generator) for name in names]
    matrices = torch.stack([x.mT @ x for x in factors])
    found = solve(matrices, "thread")
    assert found.certified.tolist() == [1] * len(names)
    for matrix, eigenvalues, vectors in zip(
        matrices, found.eigenvalues, found.vectors, strict=True
    ):
        assert_solved(matrix, eigenvalues, vectors)


def test_the_bits_do_not_depend_on_the_order_of_threads(generator):
    x = torch.stack([MATRICES[name](40, generator) for name in ("gaussian", "duplicates")])
    matrices = x.mT @ x
    first, second = solve(matrices, seed=1), solve(matrices, seed=2)
    assert all(map(torch.equal, first, second))


def test_other_problems_do_not_see_a_matrix_that_is_not_finite(generator):
    x = gaussian(24, generator)
    matrices = (x.mT @ x).expand(4, 24, 24).clone()
    matrices[1, 3, 5] = torch.nan
    matrices[2, 23, 23] = -torch.inf
    found = solve(matrices)
    assert found.certified.tolist() == [1, 0, 0, 1]
    assert found.rank.tolist() == [24] * 4
    for broken in (1, 2):
        assert bool(found.eigenvalues[broken].isnan().all() and found.vectors[broken].isnan().all())
    assert torch.equal(found.vectors[0], found.vectors[3])
    assert_solved(matrices[0], found.eigenvalues[0], found.vectors[0])


def ranks_by_formula(exact: Tensor, threshold: float) -> list[int]:
    share = exact.cumsum(-1) / exact.sum(-1, keepdim=True)
    return ((share < threshold).sum(-1) + 1).tolist()


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 1.0])
def test_only_the_vectors_that_a_threshold_needs(threshold, generator):
    n = 40
    exponents = (0.3, 1.0, 2.0)
    x = torch.stack(
        [
            hkt.power_law(n, 64, exponent=exponent, dtype=torch.float64, generator=generator)
            for exponent in exponents
        ]
    )
    x = x - x.mean(-2, keepdim=True)
    matrices = x @ x.mT
    found = solve(matrices, threshold=threshold)
    exact = torch.linalg.eigvalsh(matrices).flip(-1).clamp(min=0)
    if threshold < 1:  # all of a sum that ends in rounding is reached anywhere near its end
        assert found.rank.tolist() == ranks_by_formula(exact, threshold)
    for p in range(len(exponents)):
        rank = int(found.rank[p])
        kept = 2 * rank < n
        written = slice(0, rank) if kept else slice(rank, n)
        vectors = found.vectors[p, :, written]
        others = found.vectors[p, :, rank:] if kept else found.vectors[p, :, :rank]
        assert bool(others.isnan().all())
        assert bool(found.certified[p])
        identity = torch.eye(vectors.shape[1], dtype=torch.float64)
        assert float((vectors.mT @ vectors - identity).abs().sum()) <= 4 * n * n * EPS
        residual = matrices[p] @ vectors - vectors * found.eigenvalues[p, written]
        assert float(residual.abs().sum()) <= 8 * n * n * EPS


def test_no_variance_keeps_every_direction(generator):
    n = 12
    x = gaussian(n, generator)
    matrices = torch.stack([x.mT @ x, x.mT @ x, torch.zeros(n, n, dtype=torch.float64)])
    trace = float((x.mT @ x).trace())
    relative, absolute = reference.floor_of(torch.float64, "relative")
    shifts = torch.tensor([0.0, 2 * trace / relative, 0.0])
    found = solve(matrices, threshold=0.5, shifts=shifts, floor=(relative, absolute))
    assert found.rank[0] < n
    assert found.rank[1:].tolist() == [n, n]


@pytest.mark.parametrize("n", [0, 129, -1])
def test_a_side_that_no_kernel_has_is_refused(n):
    side = max(n, 0)
    with pytest.raises(AssertionError, match="CUDA error 1"):
        solve(torch.zeros(1, side, side), side=n)


def test_no_problems():
    found = solve(torch.zeros(0, 5, 5))
    assert found.eigenvalues.shape == (0, 5)

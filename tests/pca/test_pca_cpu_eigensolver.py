"""csrc/cpu/symmetric_eigen.cpp, the eigensolver of the `cpu` backend, by name on hard matrices."""

import pytest
import torch
from hard_matrices import MATRICES, gaussian
from torch import Tensor

from himo_kernels import extension

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

EPS = torch.finfo(torch.float64).eps


def solve(x: Tensor, solver: str = "himo") -> tuple[Tensor, Tensor, Tensor]:
    """Returns A = x^T x [*, n, n], its eigenvalues [*, n] and its eigenvectors in columns."""
    matrix = x.mT @ x
    n = matrix.shape[-1]
    eigenvalues, eigenvectors = extension.load().solve_symmetric(matrix.view(-1, n, n), solver)
    return matrix, eigenvalues.view(matrix.shape[:-1]), eigenvectors.view(matrix.shape)


def assert_solved(x: Tensor) -> None:
    matrix, eigenvalues, eigenvectors = solve(x)
    # Rescaled so that nothing in the check overflows or underflows.
    scale = torch.clamp(matrix.abs().max(), min=1e-300)
    matrix, eigenvalues = matrix / scale, eigenvalues / scale
    n = len(eigenvalues)
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    tolerance = 8 * n * EPS * max(1.0, float(exact[0]))  # the moment's own error takes half
    assert bool((eigenvalues[:-1] >= eigenvalues[1:]).all())
    assert float((eigenvalues - exact.clamp(min=0)).abs().max()) <= tolerance
    residual = matrix @ eigenvectors - eigenvectors * eigenvalues
    assert float(residual.abs().max()) <= tolerance
    identity = torch.eye(n, dtype=torch.float64)
    assert float((eigenvectors.mT @ eigenvectors - identity).abs().max()) <= 4 * n * EPS


@pytest.mark.parametrize("n", [20, 65, 150, 270])
@pytest.mark.parametrize("name", MATRICES)
def test_hard_matrices(name, n, generator):
    assert_solved(MATRICES[name](n, generator))


# Sizes around registers of 8, panels of 16, leaves and blocks of 24, and their halves.
@pytest.mark.parametrize(
    "n", [2, 3, 4, 7, 8, 9, 15, 16, 17, 18, 23, 24, 25, 26, 47, 48, 49, 50, 97, 127, 128, 129, 513]
)
@pytest.mark.parametrize("name", ["gaussian", "one-hot"])
def test_sides_around_every_block(name, n, generator):
    assert_solved(MATRICES[name](n, generator))


@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_bits_are_the_same_from_run_to_run(n, threads, generator):
    x = gaussian(n, generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = solve(x), solve(x)
        assert_solved(x)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first[1:], second[1:]))  # first[0] is torch's matmul


def test_a_batch_is_solved_on_one_thread_each(generator):
    x = torch.stack([gaussian(150, generator) for _ in range(4)])
    matrix, eigenvalues, eigenvectors = solve(x)
    rebuilt = (eigenvectors * eigenvalues.unsqueeze(-2)) @ eigenvectors.mT
    torch.testing.assert_close(rebuilt, matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [20, 150])
def test_both_solvers_find_the_same_values_of_an_indefinite_matrix(n, generator):
    matrix = torch.randn(1, n, n, dtype=torch.float64, generator=generator)
    matrix = matrix + matrix.mT
    ours, lapack = (extension.load().solve_symmetric(matrix, s)[0] for s in ("himo", "lapack"))
    torch.testing.assert_close(ours, lapack, rtol=0, atol=8 * n * EPS * float(lapack.abs().max()))


@pytest.mark.parametrize("n", [8, 31, 32, 127, 128])  # on both sides of where the choice changes
def test_pca_uses_the_solver_that_info_names(n, generator):
    x = gaussian(n, generator)
    library = extension.load()
    _, moment = library.covariance_fwd(x, torch.float64)
    eigenvalues, eigenvectors = library.solve_symmetric(moment[None], library.eigensolver(n))
    _, found, _, _, vectors = library.pca_fwd(x, 0.9, (0, 0))
    assert torch.equal(found, eigenvalues[0].clamp(min=0))
    assert torch.equal(vectors, eigenvectors[0])


@pytest.mark.parametrize(
    ("matrix", "solver", "message"),
    [
        (torch.eye(4).double()[None], "svd", 'solver must be "himo" or "lapack", got svd'),
        (torch.eye(4)[None], "himo", "float64|Double"),
        (torch.ones(1, 4, 3).double(), "himo", r"\[B, n, n\]"),
        (torch.ones(1, 1, 1).double(), "himo", "n >= 2"),
    ],
)
def test_bad_arguments_are_named(matrix, solver, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        extension.load().solve_symmetric(matrix, solver)

"""Matrices on which eigensolvers fail: clustered, graded, split, of any magnitude."""

import torch
from torch import Tensor


def of_factor(factor: Tensor) -> Tensor:  # [n, n] -> [2 n, n]
    return torch.stack([factor, -factor], 1).flatten(0, 1) * 0.5**0.5


def of_tridiagonal(diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    matrix = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    return of_factor(torch.linalg.cholesky(matrix).mT)


def of_spectrum(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    n = len(eigenvalues)
    rotation = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    return of_factor(eigenvalues.sqrt().unsqueeze(-1) * rotation)


def glued_wilkinson(n: int, glue: float) -> Tensor:
    # W21+, whose largest eigenvalues form pairs equal to rounding; repeated and shifted positive.
    position = torch.arange(n)
    diagonal = (position % 21 - 10).abs().double() + 3
    return of_tridiagonal(diagonal, torch.where(position[1:] % 21 == 0, glue, 1.0).double())


def one_hot(n: int, generator: torch.Generator) -> Tensor:
    labels = torch.randint(0, n // 4 + 1, (n,), generator=generator)
    return of_factor(torch.nn.functional.one_hot(labels, n).double())


def duplicates(n: int, generator: torch.Generator) -> Tensor:
    labels = torch.randint(0, n // 4 + 1, (n,), generator=generator)
    return of_factor(torch.randn(n, n, dtype=torch.float64, generator=generator)[:, labels])


def gaussian(n: int, generator: torch.Generator) -> Tensor:
    return of_factor(torch.randn(n, n, dtype=torch.float64, generator=generator))


MATRICES = {
    "gaussian": gaussian,
    "rank 3": lambda n, g: of_factor(gaussian(n, g)[:n] * (torch.arange(n) < 3).unsqueeze(-1)),
    "duplicates": duplicates,
    "one-hot": one_hot,
    "zero": lambda n, g: torch.zeros(2 * n, n, dtype=torch.float64),
    "identity": lambda n, g: of_factor(torch.eye(n, dtype=torch.float64)),
    "ones": lambda n, g: of_factor(torch.ones(n, n, dtype=torch.float64)),
    "diagonal": lambda n, g: of_factor(torch.rand(n, dtype=torch.float64, generator=g).diag()),
    "two values": lambda n, g: of_spectrum(1.0 + torch.arange(n).double() % 2, g),
    "close values": lambda n, g: of_spectrum(1 + 1e-13 * torch.arange(n).double(), g),
    "graded": lambda n, g: of_spectrum(torch.logspace(0, -30, n, dtype=torch.float64), g),
    "graded columns": lambda n, g: gaussian(n, g) * torch.logspace(0, -75, n, dtype=torch.float64),
    "graded columns, last largest": lambda n, g: (
        gaussian(n, g) * torch.logspace(-75, 0, n, dtype=torch.float64)
    ),
    "entries of 1e-150": lambda n, g: gaussian(n, g) * 1e-75,
    "entries of 1e+150": lambda n, g: gaussian(n, g) * 1e75,
    "second differences": lambda n, g: of_tridiagonal(
        torch.full((n,), 2.0).double(), torch.full((n - 1,), -1.0).double()
    ),
    "Wilkinson": lambda n, g: of_tridiagonal(
        (torch.arange(n).double() - (n - 1) / 2).abs() + 3, torch.ones(n - 1).double()
    ),
    "glued": lambda n, g: glued_wilkinson(n, 1e-8),
    "loosely glued": lambda n, g: glued_wilkinson(n, 1e-14),
}

"""The steps of pca_reconstruct for some rows of a batch, given the moment of the whole batch.

One process of distributed HiDe runs these. X [M, D] holds its own rows (M may be 0). The mean, the
moment C = X^T X [D, D] and its decomposition are of the whole batch. Autograd and schemas are in
himo_kernels/distributed/moments.py. Equation numbers refer to README.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from himo_kernels import _triton
from himo_kernels.dispatch import Backend, Operator
from himo_kernels.pca import cpu, reference

_PARTS = ("decompose", "reconstruct", "grad_projector", "bwd")


MOMENT = Operator(
    "pca_moment",
    {
        "triton": _triton.backend(
            "himo_kernels.pca.triton", "moment", _triton.why_not_with_float64, parts=_PARTS
        ),
        "cpu": Backend.of(cpu, "moment", cpu.why_not_decompose, parts=_PARTS),
        "reference": Backend.of(reference, "moment", parts=_PARTS),
    },
    public=False,
)


def decompose(
    moment: Tensor,  # [D, D] float64
    mean: Tensor,  # [D] float64
    samples: int,  # N
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from reference.floor_of
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns eigenvalues [D] descending, eigenvectors [D, D] in columns, rank []: eq. (2)."""
    arguments = (moment, mean, samples, variance_threshold, floor)
    return MOMENT.run("decompose", *arguments, backend)


def reconstruct(
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64, like the decomposition below
    eigenvalues: Tensor,  # [D]
    eigenvectors: Tensor,  # [D, D]
    rank: Tensor,  # [] int64
    backend: str,
) -> Tensor:
    """Returns U' [M, D] in x's dtype: eq. (3)."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    return MOMENT.run("reconstruct", x, mean, eigenvalues, eigenvectors, rank, backend)


def grad_projector(
    grad: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D]
    backend: str,
) -> Tensor:
    """Returns B = X^T G [D, D] float64, summed over these rows: eq. (4)."""
    if x.shape[0] == 0:
        return mean.new_zeros(x.shape[1], x.shape[1])
    return MOMENT.run("grad_projector", grad, x, mean, backend)


def bwd(
    grad: Tensor,  # [M, D]
    grad_mean: Tensor,  # [D], over the whole batch
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D]
    symmetric: Tensor | None,  # [D, D]: B + B^T of the whole batch; None if the basis is constant
    eigenvalues: Tensor,  # [D]
    eigenvectors: Tensor,  # [D, D]
    rank: Tensor,  # []
    gap_eps: float,
    backend: str,
) -> Tensor:
    """Returns dX [M, D] in x's dtype: eq. (5) to (7)."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    decomposition = (eigenvalues, eigenvectors, rank)
    arguments = (grad, grad_mean, x, mean, symmetric, *decomposition, gap_eps)
    return MOMENT.run("bwd", *arguments, backend)

"""Computes the factors of the components, and from them query and keys: README.md (1) to (3)."""

from typing import NamedTuple

import torch
from torch import Tensor

from himo_kernels import extension
from himo_kernels._numerics import accumulation_dtype

# As in csrc/cpu/pca_reconstruct.cpp: float32 suffices if lambda_R >= trace / (16 n).
_SPREAD = 16
# If the mean square of X is in this range, no float32 product overflows or underflows.
_FLOAT32_RANGE = (1e-20, 1e20)


class Texts(NamedTuple):
    """The texts of one problem and their decomposition."""

    features: Tensor  # U [N, D]
    mean: Tensor  # [D] float64
    eigenvalues: Tensor  # [n] float64
    eigenvectors: Tensor  # [n, n] float64
    rank: int

    @property
    def feature_side(self) -> bool:
        """Returns whether the eigenvectors belong to X^T X; if not, they belong to X X^T."""
        return self.features.shape[1] <= self.features.shape[0]

    @property
    def is_nan(self) -> bool:
        """Returns whether the decomposition is NaN."""
        return bool(self.eigenvalues[0].isnan())

    @property
    def keeps_all(self) -> bool:
        """Returns whether U' = U."""
        return self.rank == self.eigenvalues.shape[0]


class Factors(NamedTuple):
    """U' = C B of (1), and the lengths of its rows, (2)."""

    centred: Tensor  # X [N, D]
    coefficients: Tensor  # C [N, R + 1], the last column 1
    basis: Tensor  # B [R + 1, D], the last row the mean
    squares: Tensor | None  # l [R], squared lengths of the first R rows of B; None means 1
    overlaps: Tensor  # m [R], products of these rows with the mean
    length: Tensor | None  # [N, 1], |u'|; None if not normalised
    keys: Tensor  # C / |u'| [N, R + 1]


class Room:
    """The cached factors of one problem: the forward writes them, the backward reads them.

    Without a cache, each matrix is allocated.
    """

    def __init__(self, memory: Tensor | None, like: Tensor, filled: bool) -> None:
        self.memory, self.like = memory, like
        self.filled = filled and memory is not None

    def take(self, rows: int, columns: int) -> Tensor:
        """Returns the next matrix [rows, columns]."""
        if self.memory is None:
            return self.like.new_empty(rows, columns)
        taken, self.memory = self.memory.tensor_split([rows * columns])
        return taken.view(rows, columns)


def component_operands(
    images: Tensor, texts: Texts, normalize: bool, memory: Tensor | None, *, filled: bool
) -> tuple[Tensor, Tensor, Factors | None]:
    """Returns query and keys of the component logits, and the factors if they are used.

    Query and keys are [N, R + 1] if that is less work, else [N, D]. memory is the cache of the
    factors: read if filled, else written.
    """
    features = texts.features
    if texts.is_nan:
        return images, torch.full_like(features, torch.nan), None
    if texts.keeps_all:
        return images, extension.load().normalize_fwd(features) if normalize else features, None
    dtype = accumulation_dtype(features.dtype)
    centred = _centred(features, texts.mean, _dtype_of_products(texts))
    room = Room(memory if centred.dtype == dtype else None, centred, filled)
    factors = _factors(texts, normalize, centred, room)
    if _is_low_rank(texts):
        query = room.take(len(images), texts.rank + 1)
        if not room.filled:
            torch.mm(images.to(query.dtype), factors.basis.mT, out=query)  # (3)
        return query.to(dtype), factors.keys.to(dtype), factors
    return images, (factors.keys @ factors.basis).to(features.dtype), factors


def _is_low_rank(texts: Texts) -> bool:
    # Products of factors are float32, which run at half the rate of bfloat16.
    half_rate = texts.features.dtype == torch.bfloat16 and extension.load().multiplies_bfloat16()
    return (texts.rank + 1) * (2 if half_rate else 1) < texts.features.shape[1]


def _factors(texts: Texts, normalize: bool, centred: Tensor, room: Room) -> Factors:
    (samples, width), dtype = centred.shape, centred.dtype
    _, mean, values, vectors, rank = texts
    coefficients, basis = room.take(samples, rank + 1), room.take(rank + 1, width)
    own, rows = coefficients[:, :rank], basis[:rank]
    if not room.filled:
        if texts.feature_side:
            rows.copy_(vectors[:, :rank].mT)
            torch.mm(centred, rows.mT, out=own)
        else:
            own.copy_(vectors[:, :rank])
            torch.mm(own.mT, centred, out=rows)
        coefficients[:, rank] = 1
        basis[rank] = mean
    squares = inverse = None
    if not texts.feature_side:
        squares = values[:rank]
        inverse = torch.where(squares > noise_level(values), 1 / squares, 0.0).to(dtype)
        squares = squares.to(dtype)
    overlaps = rows @ basis[rank]
    if not normalize:
        return Factors(centred, coefficients, basis, squares, overlaps, None, coefficients)
    # (2): u' = (C + m / l) B + (part of the mean orthogonal to B). Orthogonal terms do not cancel.
    along = overlaps if inverse is None else overlaps * inverse
    across = torch.addmv(basis[rank], rows.mT, along, alpha=-1)
    shifted = (own + along).square_()
    length = shifted.sum(1) if squares is None else shifted @ squares
    length = length.add_(across.dot(across)).sqrt_().unsqueeze(1)
    keys = coefficients / length
    if not length.all():  # a row of zeros has no direction, as in normalize
        keys = torch.where(length == 0, 0.0, keys)
    return Factors(centred, coefficients, basis, squares, overlaps, length, keys)


def _dtype_of_products(texts: Texts) -> torch.dtype:
    values, entries = texts.eigenvalues, texts.features.numel()
    if texts.features.dtype == torch.float64:
        return torch.float64
    trace = float(values.sum())
    fits = float(values[texts.rank - 1]) * len(values) * _SPREAD >= trace
    low, high = _FLOAT32_RANGE
    return torch.float32 if fits and low <= trace / entries <= high else torch.float64


def noise_level(eigenvalues: Tensor) -> Tensor:
    # An eigenvalue at or below this is a rounding error of the largest.
    return eigenvalues[0] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


def _centred(features: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return features.double() - mean
    # The float64 mean as the sum of two float32 numbers, so the subtraction rounds only once.
    high = mean.to(dtype)
    return (features - high).sub_((mean - high).to(dtype))

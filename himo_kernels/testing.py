"""Inputs, float64 oracles and the error budget that tests and benchmarks share.

Factories return rows in the requested dtype. A test that promotes them to float64 for its oracle
therefore compares arithmetic, not input rounding. Each takes a CPU torch.Generator, so that a seed
gives the same batch on every device.
"""

import os
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from himo_kernels import dispatch


def power_law(
    samples: int,
    features: int,
    *,
    batch: tuple[int, ...] = (),
    exponent: float = 1.0,
    noise: float = 0.02,
    mean_offset: float = 1.0,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows like a batch of text features: eigenvalues ~ i^-exponent + noise, around a common mean.

    [*batch, samples, features]; rows of length 1 unless normalize=False. mean_offset is the length
    of the common vector relative to a row's deviation from it.
    """
    scales = torch.arange(1, features + 1, dtype=torch.float64) ** (-exponent / 2) + noise
    scales = scales / scales.square().sum().sqrt()
    x = _randn((*batch, samples, features), generator) * scales
    x = x @ _rotation(features, generator)
    direction = F.normalize(_randn((*batch, 1, features), generator), dim=-1)
    x = x + mean_offset * direction
    return (F.normalize(x, dim=-1) if normalize else x).to(device, dtype)


def controlled_spectrum(
    eigenvalues: Tensor,  # [*, K], K <= min(N - 1, D)
    samples: int,
    features: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows [*, samples, features] whose centred X^T X has these non-zero eigenvalues.

    Not normalised: normalising rows would change the spectrum.
    """
    *batch, count = eigenvalues.shape
    if not count <= min(samples - 1, features):
        raise ValueError(
            f"controlled_spectrum: expected at most min(samples - 1, features) = "
            f"{min(samples - 1, features)} eigenvalues, got {count}"
        )
    left = _randn((*batch, samples, count), generator)
    left, _ = torch.linalg.qr(left - left.mean(-2, keepdim=True))  # orthonormal, centred columns
    right, _ = torch.linalg.qr(_randn((*batch, features, count), generator))
    x = (left * eigenvalues.double().sqrt().unsqueeze(-2)) @ right.mT
    return (x + _randn((*batch, 1, features), generator)).to(device, dtype)


def duplicate_captions(
    samples: int,
    features: int,
    pairs: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A power-law batch whose first `pairs` rows are repeated as the next `pairs` rows."""
    if not 0 <= 2 * pairs <= samples:
        raise ValueError(
            f"duplicate_captions: expected 2 * pairs <= samples = {samples}, got {pairs}"
        )
    x = power_law(samples, features, dtype=dtype, device=device, generator=generator)
    x[pairs : 2 * pairs] = x[:pairs]
    return x


def label_captions(
    samples: int,
    features: int,
    labels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows drawn from `labels` distinct captions, as in a dataset of class names."""
    distinct = power_law(labels, features, dtype=dtype, device=device, generator=generator)
    return distinct[torch.randint(labels, (samples,), generator=generator).to(device)]


def repeated_row(
    samples: int,
    features: int,
    copies: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A power-law batch whose first `copies` rows are equal."""
    x = power_law(samples, features, dtype=dtype, device=device, generator=generator)
    x[:copies] = x[0].clone()
    return x


def equal_rows(
    samples: int,
    features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One row repeated `samples` times: zero variance."""
    row = power_law(1, features, dtype=dtype, device=device, generator=generator)
    return row.repeat(samples, 1)


def one_hot_rows(
    samples: int,
    features: int,
    classes: int = 8,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Row i is the one-hot vector of i mod classes: equal eigenvalues among the kept."""
    columns = torch.arange(samples) % min(classes, features)
    return F.one_hot(columns, features).to(device, dtype)


def rank_deficient(
    samples: int,
    features: int,
    rank: int = 20,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows of length 1 in a subspace of `rank` dimensions, without noise outside it."""
    inner = min(rank, samples, features)
    x = _randn((samples, inner), generator) @ _randn((inner, features), generator)
    return F.normalize(x, dim=-1).to(device, dtype)


def equal_eigenvalues_at_cut(
    samples: int,
    features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows whose eigenvalues are all equal, so that every threshold cuts between equal ones."""
    return controlled_spectrum(
        torch.ones(min(samples - 1, features), dtype=torch.float64),
        samples,
        features,
        dtype=dtype,
        device=device,
        generator=generator,
    )


def confident_positives(
    samples: int,
    features: int,
    *,
    probability: float = 0.999,
    logit_scale: float = 100.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Image and text features [samples, features] whose positives have this mean probability.

    The texts are the images rotated by one common angle, found by bisection.
    """
    images = F.normalize(_randn((samples, features), generator), dim=-1)
    noise = _randn((samples, features), generator)
    orthogonal = F.normalize(noise - (noise * images).sum(-1, keepdim=True) * images, dim=-1)

    def texts_at(cosine: float) -> Tensor:
        return cosine * images + (1 - cosine**2) ** 0.5 * orthogonal

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        logits = logit_scale * images @ texts_at(middle).T
        confident = logits.softmax(-1).diagonal().mean() > probability
        low, high = (low, middle) if confident else (middle, high)
    return images.to(device, dtype), texts_at(high).to(device, dtype)


# Batches on which the released code's SVD gives a NaN or unbounded gradient, by name.
DEGENERATE: dict[str, Callable[..., Tensor]] = {
    "2 duplicate pairs": lambda n, d, **kw: duplicate_captions(n, d, min(2, n // 2), **kw),
    "64 duplicate pairs": lambda n, d, **kw: duplicate_captions(n, d, min(64, n // 2), **kw),
    "4 labels": lambda n, d, **kw: label_captions(n, d, 4, **kw),
    "32 copies of one row": lambda n, d, **kw: repeated_row(n, d, min(32, n), **kw),
    "all rows equal": equal_rows,
    "one-hot rows": one_hot_rows,
    "orthogonal rows": lambda n, d, **kw: one_hot_rows(n, d, d, **kw),
    "rank 20": rank_deficient,
    "equal eigenvalues at the cut": equal_eigenvalues_at_cut,
    "zeros": lambda n, d, dtype=torch.float32, device="cpu", generator=None: torch.zeros(
        n, d, dtype=dtype, device=device
    ),
}


def oracle_pca_reconstruct(x: Tensor, variance_threshold: float) -> tuple[Tensor, Tensor]:
    """HiDe in float64 through torch.linalg.svd and autograd: (reconstruction [*, N, D], rank [*]).

    Independent of the closed-form gradient. Gradients are NaN if the SVD is degenerate.
    """
    x = x.double()
    mean = x.mean(-2, keepdim=True)
    _, singular_values, right = torch.linalg.svd(x - mean, full_matrices=False)
    ratio = singular_values.square().cumsum(-1) / singular_values.square().sum(-1, keepdim=True)
    rank = ((ratio < variance_threshold).sum(-1) + 1).clamp(max=singular_values.shape[-1])
    kept = torch.arange(right.shape[-2], device=x.device) < rank.unsqueeze(-1)
    basis = right * kept.unsqueeze(-1)
    return (x - mean) @ basis.mT @ basis + mean, rank


def oracle_info_nce(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
) -> Tensor:
    """InfoNCE in both directions by F.cross_entropy, in the dtype of the features."""
    labels = torch.arange(image_features.shape[0], device=image_features.device)
    image_keys, text_keys = image_features, text_features
    if not differentiate_keys:
        image_keys, text_keys = image_keys.detach(), text_keys.detach()
    rows = logit_scale * image_features @ text_keys.T
    columns = logit_scale * text_features @ image_keys.T
    return (
        F.cross_entropy(rows, labels, label_smoothing=label_smoothing)
        + F.cross_entropy(columns, labels, label_smoothing=label_smoothing)
    ) / 2


def runnable_backends(
    operator: str, device: torch.device | str = "cpu", *, interpreted: bool = True
) -> list[str]:
    """Names of the backends of an operator that can take float32 features on this device.

    interpreted=False excludes backends that only Triton's interpreter runs there, at half a second
    per small eigenproblem.
    """
    table = dispatch.OPERATORS[operator]
    x = torch.zeros(2, 2, device=device)
    names = [name for name in table.backends if table.why_not(name, x) is None]
    return [name for name in names if interpreted or x.is_cuda or name != "triton"]


def relative_error(actual: Tensor, exact: Tensor, least_norm: float = 0.0) -> float:
    """||actual - exact|| / max(||exact||, least_norm) in float64; the numerator if that is 0."""
    exact = exact.detach().double()
    norm = exact.norm().clamp(min=least_norm)
    difference = (actual.detach().double() - exact).norm()
    return float(difference / norm if norm > 0 else difference)


def assert_within_budget(
    name: str,
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    terms: int,
    constant: float = 1.0,
    least_norm: float = 0.0,
) -> None:
    """Asserts err(actual) <= err(eager) + constant * eps * sqrt(terms), errors against exact.

    The error budget of every backend. eager is the plain PyTorch formula in the dtype of actual,
    exact the same formula in float64 on the same inputs. terms is the length of the longest sum.
    least_norm is the norm of the summands, for sums that may cancel.
    """
    eps = torch.finfo(actual.dtype).eps
    actual_error, eager_error = (relative_error(x, exact, least_norm) for x in (actual, eager))
    budget = eager_error + constant * eps * terms**0.5
    if not actual_error <= budget:
        raise AssertionError(
            f"{name}: error {actual_error:.3e} above the budget {budget:.3e} "
            f"(eager PyTorch in {actual.dtype}: {eager_error:.3e}, eps sqrt({terms}) added)"
        )


def separate_compile_cache() -> None:
    """Gives torch.compile a separate cache if ATEN_CPU_CAPABILITY limits the instruction set.

    Inductor's cache key lacks that variable. A kernel compiled for AVX-512 would be loaded
    under AVX2, whose vectors are half as long, and would skip half of the entries (torch 2.13).
    """
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{capability}")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache


def _randn(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _rotation(size: int, generator: torch.Generator | None) -> Tensor:
    q, _ = torch.linalg.qr(_randn((size, size), generator))
    return q

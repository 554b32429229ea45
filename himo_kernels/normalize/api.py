"""normalize: rows of length 1."""

from torch import Tensor

from himo_kernels._checks import check_features, check_finite_values, check_flag
from himo_kernels.normalize.op import NORMALIZE, Normalize


def normalize(
    features: Tensor,  # [*, N, D]
    *,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rows divided by their L2 length, in the dtype of the features.

    Equal to `x / x.norm(dim=-1, keepdim=True)` with `x = features.float()` (`double()` for
    float64), rounded once. Differs from `F.normalize`, which divides by 1e-12 there, in rows
    shorter than that: they get length 1, and a row of zeros gives zeros and gets no gradient. A
    length may be too large or too small for the dtype where no entry is: squares neither overflow
    nor underflow. A row with NaN or inf is NaN in every entry, and so is its gradient; the other
    rows are what they are without it.

    Args:
        features: Rows [*, N, D], N and D >= 1, float16, bfloat16, float32 or float64.
        check_finite: Raise on NaN or inf in features (reads the device) rather than return NaN.
        backend: "auto", "reference", "cpu" or "triton". A named one never falls back.

    Returns:
        [*, N, D], contiguous. First-order differentiable in features.

    Raises:
        ValueError: wrong shape or value. TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take features.
    """
    check_features("normalize", "features", features)
    if check_flag("normalize", "check_finite", check_finite):
        check_finite_values("normalize", features=features)
    return Normalize.apply(features, NORMALIZE.resolve(backend, features))

"""normalize: rows of length 1."""

from torch import Tensor

from himo_kernels._checks import check_features, check_finite_values, check_flag
from himo_kernels.dispatch import apply_function
from himo_kernels.normalize.op import NORMALIZE, Normalize


def normalize(
    features: Tensor,  # [*, N, D]
    *,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rows divided by their L2 length, in the dtype of the features.

    Equal to `x / x.norm(dim=-1, keepdim=True)` with `x = features.float()` (`double()` for
    float64), rounded once. `F.normalize` divides rows shorter than 1e-12 by 1e-12; here they get
    length 1 too. A row of zeros gives zeros, with a gradient of zero. Squares neither overflow nor
    underflow, even if the length of a row is out of the range of the dtype. A row with NaN or inf
    becomes NaN in every entry, and so does its gradient; other rows are not affected.

    Args:
        features: Rows [*, N, D], N and D >= 1, float16, bfloat16, float32 or float64.
        check_finite: Raise on NaN or inf in features (syncs with the device) instead of returning
            NaN.
        backend: "auto", "reference", "cpu" or "triton". A named backend never falls back.

    Returns:
        [*, N, D], contiguous. First-order differentiable in features.

    Raises:
        ValueError: wrong shape or value.
        TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take features.
    """
    check_features("normalize", "features", features)
    if check_flag("normalize", "check_finite", check_finite):
        check_finite_values("normalize", features=features)
    return apply_function(Normalize, features, NORMALIZE.resolve(backend, features))

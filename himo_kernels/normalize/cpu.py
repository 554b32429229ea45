"""The `cpu` backend of normalize: csrc/normalize.cpp, for any strides.

One pass over memory in each direction; the reference writes an [N, D] tensor for each operation.
"""

from torch import Tensor

from himo_kernels import extension


def normalize_fwd(
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the rows divided by their length [*, N, D]."""
    return extension.load().normalize_fwd(features)


def normalize_bwd(
    grad: Tensor,  # [*, N, D]
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the gradient of the features [*, N, D]."""
    return extension.load().normalize_bwd(grad, features)

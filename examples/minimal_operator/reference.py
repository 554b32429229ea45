"""scale_rows in plain PyTorch: the specification."""

from torch import Tensor


def scale_rows_fwd(x: Tensor, scale: Tensor) -> Tensor:  # [N, D], [N]
    """Returns y [N, D]: y_i = s_i x_i."""
    return x * scale[:, None]


def scale_rows_bwd(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns s_i dy_i [N, D] and x_i . dy_i [N]."""
    return grad * scale[:, None], (grad * x).sum(-1)

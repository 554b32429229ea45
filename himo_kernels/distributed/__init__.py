"""The operators over several processes on torch.distributed, with exact values and gradients."""

from himo_kernels.distributed.gather import all_gather
from himo_kernels.distributed.loss import dual_info_nce, info_nce
from himo_kernels.distributed.moments import pca_reconstruct
from himo_kernels.distributed.sigmoid import sigmoid_loss
from himo_kernels.distributed.wire import Traffic, count_traffic

__all__ = [
    "Traffic",
    "all_gather",
    "count_traffic",
    "dual_info_nce",
    "info_nce",
    "pca_reconstruct",
    "sigmoid_loss",
]

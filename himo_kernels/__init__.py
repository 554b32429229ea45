"""Kernels for HiMo-CLIP (arXiv 2511.06653): in-batch PCA and the dual InfoNCE loss.

Needs only torch. Triton and the compiled extension are used if installed; `python -m
himo_kernels.info` prints which backends each operator has here, and why it lacks the others.
"""

from himo_kernels import nn
from himo_kernels._version import __version__
from himo_kernels.covariance import covariance, gram
from himo_kernels.himo_loss import himo_loss
from himo_kernels.info_nce import dual_info_nce, dual_info_nce_low_rank, info_nce, nt_xent
from himo_kernels.integrations import accelerate
from himo_kernels.normalize import normalize
from himo_kernels.pca import PCA, pca, pca_reconstruct, project_reconstruct
from himo_kernels.sigmoid_loss import sigmoid_loss

__all__ = [
    "PCA",
    "__version__",
    "accelerate",
    "covariance",
    "dual_info_nce",
    "dual_info_nce_low_rank",
    "gram",
    "himo_loss",
    "info_nce",
    "nn",
    "normalize",
    "nt_xent",
    "pca",
    "pca_reconstruct",
    "project_reconstruct",
    "sigmoid_loss",
]

"""In-batch PCA with a cumulative-variance threshold, and projection onto the kept components."""

from himo_kernels.pca.api import PCA, pca, pca_reconstruct, project_reconstruct

__all__ = ["PCA", "pca", "pca_reconstruct", "project_reconstruct"]

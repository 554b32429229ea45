"""Batched mean with the centred second moment of the features, or of the samples."""

from himo_kernels.covariance.api import covariance, gram

__all__ = ["covariance", "gram"]

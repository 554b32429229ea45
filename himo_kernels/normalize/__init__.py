"""Rows divided by their L2 length."""

from himo_kernels.normalize.api import normalize

__all__ = ["normalize"]

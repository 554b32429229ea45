"""Existing training code with himo_kernels inside, by one line, and back again."""

from himo_kernels.integrations.patch import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate"]

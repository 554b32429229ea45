"""Puts himo_kernels into existing training code with one line, reversibly."""

from himo_kernels.integrations.patch import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate"]

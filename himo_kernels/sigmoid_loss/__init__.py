"""The sigmoid loss of SigLIP: every pair of an image and a text is a binary classification."""

from himo_kernels.sigmoid_loss.api import sigmoid_loss

__all__ = ["sigmoid_loss"]

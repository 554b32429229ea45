"""The whole head: contrastive loss, HiDe and component loss in one operator."""

from himo_kernels.himo_loss.api import HiMoTerms, himo_loss

__all__ = ["HiMoTerms", "himo_loss"]

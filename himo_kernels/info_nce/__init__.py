"""InfoNCE of any pairs, its dual form for a global and a component loss, and NT-Xent."""

from himo_kernels.info_nce.api import dual_info_nce, dual_info_nce_low_rank, info_nce, nt_xent

__all__ = ["dual_info_nce", "dual_info_nce_low_rank", "info_nce", "nt_xent"]

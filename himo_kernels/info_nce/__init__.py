"""InfoNCE in both directions, and its dual form for a global and a component loss."""

from himo_kernels.info_nce.api import dual_info_nce, dual_info_nce_low_rank, info_nce

__all__ = ["dual_info_nce", "dual_info_nce_low_rank", "info_nce"]

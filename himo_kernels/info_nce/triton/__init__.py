"""The `triton` backend of info_nce and its dual forms. Not yet run on hardware.

tiles.py holds the tile sizes, branch.py one loss as the kernels take it, kernels.py what runs over
the logits, epilogues.py what comes after them, products.py the products that a rank on the device
bounds, statistics.py and gradients.py the two passes, operators.py the three operators, block.py a
block of the logits of a larger batch.
"""

from himo_kernels.info_nce.compose import passes
from himo_kernels.info_nce.triton.block import info_nce_block_bwd, info_nce_block_fwd
from himo_kernels.info_nce.triton.cases import aot_cases
from himo_kernels.info_nce.triton.operators import bwd, fwd

info_nce_fwd, info_nce_bwd = passes("info_nce", fwd, bwd).values()
dual_info_nce_fwd, dual_info_nce_bwd = passes("dual_info_nce", fwd, bwd).values()
dual_info_nce_low_rank_fwd, dual_info_nce_low_rank_bwd = passes(
    "dual_info_nce_low_rank", fwd, bwd
).values()

__all__ = [
    "aot_cases",
    "dual_info_nce_bwd",
    "dual_info_nce_fwd",
    "dual_info_nce_low_rank_bwd",
    "dual_info_nce_low_rank_fwd",
    "info_nce_block_bwd",
    "info_nce_block_fwd",
    "info_nce_bwd",
    "info_nce_fwd",
]

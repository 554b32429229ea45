"""What himo_kernels.aot compiles of this backend: both tiles, every dtype, every kind of branch."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from himo_kernels.aot import Case
from himo_kernels.info_nce.compose import passes
from himo_kernels.info_nce.triton import block
from himo_kernels.info_nce.triton.operators import bwd, fwd


def aot_cases() -> Iterable[Case]:
    """Yields forward and backward at sizes that take the large and the small tile."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for samples in (8192, 128):
            label = f"info_nce {str(dtype)[6:]}, N={samples}"
            yield Case(label, partial(_info_nce, samples, dtype))
            yield Case(f"{label}, low rank", partial(_low_rank, samples, dtype))
        # Of two ranks; the rows of the smaller are no multiple of 16, and so is where they begin.
        for rows, keys, offset in ((4096, 8192, 4096), (120, 257, 137)):
            label = f"info_nce_block {str(dtype)[6:]}, {rows}x{keys}"
            run = partial(_block, rows, keys, offset, dtype)
            yield Case(label, run, ragged=rows % 16 > 0)
    label = "info_nce bfloat16, N=8192, constant keys"
    yield Case(label, partial(_info_nce, 8192, torch.bfloat16, differentiate_keys=False))
    run = partial(_block, 4096, 8192, 4096, torch.bfloat16, differentiate_keys=False)
    yield Case("info_nce_block bfloat16, 4096x8192, constant keys", run)


def _info_nce(samples: int, dtype: torch.dtype, differentiate_keys: bool = True) -> None:
    features, scale = _meta(samples, 768, dtype=dtype), _meta()
    inputs = (features, features, scale)
    both = passes("info_nce", fwd, bwd)
    loss, *nlls = both["fwd"](*inputs, 0.0)
    arguments: tuple[Any, ...] = (loss, *inputs, *nlls, 0.0, differentiate_keys, [True] * 3)
    both["bwd"](*arguments)


def _low_rank(samples: int, dtype: torch.dtype) -> None:
    features, scale = _meta(samples, 768, dtype=dtype), _meta()
    coefficients, basis = _meta(samples, 257, dtype=dtype), _meta(257, 768, dtype=dtype)
    inputs = (features, features, coefficients, basis, _meta(dtype=torch.int64), scale)
    both = passes("dual_info_nce_low_rank", fwd, bwd)
    outputs = both["fwd"](*inputs, 0.0)
    nlls = [output for index, output in enumerate(outputs) if index % 3]
    arguments: tuple[Any, ...] = (*outputs[::3], *inputs, *nlls, 0.0, True, [True] * 5)
    both["bwd"](*arguments)


def _block(
    rows: int, keys: int, offset: int, dtype: torch.dtype, differentiate_keys: bool = True
) -> None:
    features = _meta(rows, 768, dtype=dtype), _meta(keys, 768, dtype=dtype)
    of_rows, of_keys = _meta(rows), _meta(keys)
    block.info_nce_block_fwd(*features, _meta(), of_rows, of_keys, offset)
    directions = (of_rows,) * 3 + (of_keys,) * 3
    settings = (offset, 0.1, keys, differentiate_keys)
    arguments: tuple[Any, ...] = (*features, _meta(), *directions, *settings)
    block.info_nce_block_bwd(*arguments)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")

"""Blocks of a larger batch in Triton: several launches per block, and no access out of bounds."""

import pytest
import torch
from block_cases import joined_bwd, joined_fwd, random_batch
from guarded_memory import between_nan, guarded_allocations
from torch import Tensor

from himo_kernels import _triton
from himo_kernels.info_nce.block import BLOCK, block_fwd

if _triton.MISSING:
    pytest.skip(_triton.MISSING, allow_module_level=True)

from himo_kernels.info_nce.triton import grad_logits, tiles
from himo_kernels.info_nce.triton import losses as pass_1

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    # Masked lanes hold arbitrary values, about which NumPy warns and a GPU does not.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.skipif(
        DEVICE == "cpu" and not _triton.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
]
KEYS = pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])


def joined(batch, differentiate_keys: bool = True, **cuts) -> tuple[Tensor, ...]:
    gradients = joined_bwd(batch, "triton", differentiate_keys, **cuts)
    return *joined_fwd(batch, "triton", **cuts), *gradients


@KEYS
def test_more_launches_give_the_same(differentiate_keys, generator, monkeypatch):
    batch = random_batch(torch.float32, DEVICE, generator)
    cuts = {"rows": (0, 40, 45), "keys": (0, 7, 45)}  # in one block of rows, and in three
    whole = joined(batch, differentiate_keys, **cuts)
    monkeypatch.setattr(pass_1, "ROW_BLOCKS_AT_ONCE", 1)
    monkeypatch.setattr(grad_logits, "WORKSPACE_BYTES", 0)  # one block of rows at a time
    for value, other in zip(joined(batch, differentiate_keys, **cuts), whole, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_a_tile_whose_only_pair_is_in_a_corner(generator):
    # A full tile, masked only for its pairs: at one corner, at the other, next to either.
    tile = tiles.tile_for(torch.empty(0, device=DEVICE), 1, 1, 1)
    rows, columns = tile.rows, tile.columns
    batch = random_batch(torch.float32, DEVICE, generator, rows + columns)
    positives = batch.positives.float()
    for row, key in ((columns - 1, 0), (0, rows - 1), (columns, 0), (0, rows), (5, 5)):
        of_rows, of_keys = slice(row, row + rows), slice(key, key + columns)
        arguments = (batch.image[of_rows], batch.text[of_keys], batch.scale)
        arguments += (positives[of_rows], positives[of_keys], row - key)
        expected = block_fwd(*arguments, "reference")
        for value, other in zip(block_fwd(*arguments, "triton"), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


def test_nothing_is_touched_outside_of_an_allocation(generator):
    batch = random_batch(torch.float32, DEVICE, generator)
    expected = joined(batch)
    batch.image, batch.text = between_nan(batch.image), between_nan(batch.text)
    with guarded_allocations(least=6):
        found = joined(batch)
    assert all(map(torch.equal, found, expected))


def test_float64_is_refused_over_ranks_with_the_reason():
    x = torch.eye(3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="got float64"):
        BLOCK.resolve("triton", x)

"""Specific to the `cpu` backend of the forms of info_nce: memory, and direct calls."""

import pytest
import torch
from fresh_process import run_python

from himo_kernels import extension

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=extension.why_not() or "")

# Growth of peak resident memory over one step. N x M float32 is 256 MiB.
PEAK = """
import sys, torch, himo_kernels
torch.set_num_threads(2)
samples, features = 8192, 64
image, text = (
    torch.nn.functional.normalize(torch.randn(samples, features), dim=-1).requires_grad_()
    for _ in range(2)
)
labels = torch.randint(samples // 2, (samples,))
scale = torch.tensor(50.0, requires_grad=True)
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
def step(samples):
    himo_kernels.info_nce(
        image[:samples],
        text[:samples],
        scale,
        labels=labels[:samples],
        same_label=sys.argv[1],
        backend="cpu",
    ).backward()
step(300)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(samples)
print(status("VmHWM") - before)
"""


FEATURE_MIB = 8192 * 64 * 4 / 2**20
# As for the square form: factors and gradients, 12 times the features; column statistics, 128
# numbers per column; the workspace of 16 MiB; the allocator's overhead. The integers of rows
# and columns take less than one table of features.
BOUND_MIB = 12 * FEATURE_MIB + 128 * 8192 * 4 / 2**20 + FEATURE_MIB + 16 + 16
LOGITS_MIB = 8192**2 * 4 / 2**20


@pytest.mark.parametrize("same_label", ["positive", "exclude"])
def test_memory_is_that_of_the_features_not_of_the_pairs(same_label):
    assert BOUND_MIB < LOGITS_MIB / 4
    peak_mib = float(run_python("-c", PEAK, same_label, HIMO_KERNELS_LOGITS_MIB="64"))
    assert peak_mib <= BOUND_MIB


@pytest.mark.parametrize("same_label", ["positive", "exclude"])
def test_kept_logits_take_one_table(same_label):
    # Up to the limit, and no mask.
    peak_mib = float(run_python("-c", PEAK, same_label, HIMO_KERNELS_LOGITS_MIB=str(LOGITS_MIB)))
    assert LOGITS_MIB <= peak_mib <= BOUND_MIB + LOGITS_MIB


def transposed(value: torch.Tensor) -> torch.Tensor:
    return value.mT.contiguous().mT


LAYOUTS = {
    "contiguous": lambda value: value,
    "columns first": transposed,
    "every second row": lambda value: value.repeat_interleave(2, -2)[..., ::2, :],
    "the same of all problems": lambda value: value[:1].expand(value.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 7, 33, 768])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_products_of_rows_with_chosen_rows(layout, width, dtype, generator):
    own = torch.randn(3, 5, width, generator=generator, dtype=torch.float64).to(dtype)
    others = LAYOUTS[layout](torch.randn(3, 9, width, generator=generator).to(dtype))
    places = torch.randint(9, (3, 5), generator=generator)
    products = extension.load().row_products(LAYOUTS[layout](own), others, places)
    chosen = torch.stack([table[place] for table, place in zip(others, places, strict=True)])
    exact = torch.einsum("bnd,bnd->bn", LAYOUTS[layout](own).double(), chosen.double())
    assert products.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Of sums of width terms, next to sums of their magnitudes.
    magnitude = torch.einsum(
        "bnd,bnd->bn", LAYOUTS[layout](own).double().abs(), chosen.double().abs()
    )
    bound = torch.finfo(products.dtype).eps * width**0.5 * magnitude
    assert ((products - exact).abs() <= bound).all()


@pytest.mark.parametrize("place", [-1, 9])
def test_a_place_outside_of_the_table_is_refused(place):
    places = torch.tensor([0, 8, place])
    with pytest.raises(ValueError, match=rf"expected places in \[0, 9\), got {place}"):
        extension.load().row_products(torch.ones(3, 2), torch.ones(9, 2), places)

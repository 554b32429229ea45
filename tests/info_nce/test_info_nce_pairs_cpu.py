"""Specific to the `cpu` backend of the forms of info_nce: memory, and direct calls."""

import pytest
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

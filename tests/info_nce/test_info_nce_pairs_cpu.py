"""Specific to the `cpu` backend of the forms of info_nce: memory."""

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


@pytest.mark.parametrize("same_label", ["positive", "exclude"])
def test_memory_is_that_of_the_features_not_of_the_pairs(same_label):
    feature_mib = 8192 * 64 * 4 / 2**20
    # As for the square form: factors and gradients, 12 times the features; column statistics, 128
    # numbers per column; the workspace of 16 MiB; the allocator's overhead. The integers of rows
    # and columns take less than one table of features.
    bound_mib = 12 * feature_mib + 128 * 8192 * 4 / 2**20 + feature_mib + 16 + 16
    assert bound_mib < 8192**2 * 4 / 2**20 / 4
    assert float(run_python("-c", PEAK, same_label)) <= bound_mib

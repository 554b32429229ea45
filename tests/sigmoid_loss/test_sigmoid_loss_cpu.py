"""Specific to the `cpu` backend of the sigmoid loss: memory, instruction sets, threads, Ctrl-C."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from fresh_process import run_python
from info_nce_cases import Target, in_float64, losses_and_gradients
from sigmoid_cases import NAME, eager_loss, sigmoid_inputs

from himo_kernels import extension
from himo_kernels.testing import relative_error

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=extension.why_not() or "")

# Growth of peak resident memory over one step. N x N float32 is 256 MiB.
PEAK = """
import torch, himo_kernels
torch.set_num_threads(2)
samples, features = 8192, 48
image, text = (
    torch.nn.functional.normalize(torch.randn(samples, features), dim=-1).requires_grad_()
    for _ in range(2)
)
scale, bias = torch.tensor(50.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
def step(samples):
    pairs = image[:samples], text[:samples]
    himo_kernels.sigmoid_loss(*pairs, scale, bias, backend="cpu").backward()
step(300)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(samples)
print(status("VmHWM") - before)
"""


def test_memory_is_that_of_the_features_not_of_the_logits():
    feature_mib = 8192 * 48 * 4 / 2**20
    # Factors and gradients, 12 times the features; the workspace of 16 MiB; the allocator's
    # overhead.
    bound_mib = 12 * feature_mib + 16 + 16
    assert bound_mib < 8192**2 * 4 / 2**20 / 4
    assert float(run_python("-c", PEAK)) <= bound_mib


AGAINST_REFERENCE = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/..", sys.argv[1] + "/../info_nce"]
from info_nce_cases import Target, losses_and_gradients
from sigmoid_cases import NAME, sigmoid_inputs
from himo_kernels.testing import relative_error
worst = 0.0
for dtype, unit in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float64, 1e-13)):
    for shape in ((65, 33), (140, 16), (1, 5)):
        generator = torch.Generator().manual_seed(int(sys.argv[2]))
        inputs = sigmoid_inputs(*shape, bias=-4.0, dtype=dtype, generator=generator)
        results = [
            losses_and_gradients(Target(NAME, backend, "cpu"), inputs)
            for backend in ("cpu", "reference")
        ]
        (losses, gradients), (true_losses, true_gradients) = results
        got, true = [*losses, *gradients.values()], [*true_losses, *true_gradients.values()]
        worst = max(worst, *(relative_error(a, b) / unit for a, b in zip(got, true)))
print(torch.backends.cpu.get_cpu_capability(), worst)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.slow
def test_narrower_instruction_sets(capability, generator):
    folder = str(__file__).rpartition("/")[0]
    seed = str(generator.initial_seed())
    printed = run_python(
        "-c", AGAINST_REFERENCE, folder, seed, ATEN_CPU_CAPABILITY=capability
    ).split()
    assert printed[0].lower() == capability
    # In multiples of eps: the order of sums may differ, the formula may not.
    assert float(printed[1]) <= 8


THREADS = """
import torch, himo_kernels
x, y = torch.randn(2, 700, 33).unbind()
leaves = [x.requires_grad_(), y.requires_grad_()]
found = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    loss = himo_kernels.sigmoid_loss(x, y, 2.0, -1.0, backend="cpu")
    with torch.inference_mode():
        assert torch.equal(himo_kernels.sigmoid_loss(x, y, 2.0, -1.0, backend="cpu"), loss)
    found.append((loss, *torch.autograd.grad(loss, leaves)))
assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
print("equal")
"""


def test_the_number_of_threads_changes_no_bit_of_a_small_batch():
    assert run_python("-c", THREADS).strip() == "equal"


def test_rounded_gradients_of_wide_bfloat16_are_no_worse_than_autocast(generator):
    # From 256 samples on, dL/dl is rounded to bfloat16 on machines with bfloat16 matmul.
    inputs = sigmoid_inputs(512, 64, dtype=torch.bfloat16, generator=generator)
    _, exact = losses_and_gradients(eager_loss, in_float64(inputs))
    _, actual = losses_and_gradients(Target(NAME, "cpu", "cpu"), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, eager = losses_and_gradients(eager_loss, inputs)
    for name in ("image_features", "text_features"):
        error = relative_error(actual[name], exact[name])
        eager_error = relative_error(eager[name], exact[name])
        assert error <= max(eager_error, torch.finfo(torch.bfloat16).eps / 2), name


LONG = """
import signal, torch, himo_kernels
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs started with &
x = torch.randn(200_000, 64)
print("started", flush=True)
himo_kernels.sigmoid_loss(x, x, 1.0, 0.0, backend="cpu")
print("finished")
"""


def test_ctrl_c_ends_a_long_call():
    process = subprocess.Popen(
        [sys.executable, "-c", LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=240)
    # The call may be slow on a busy machine; it must not have finished.
    assert time.monotonic() - sent < 60
    assert "finished" not in out
    assert err.rstrip().endswith("KeyboardInterrupt")


def test_a_direct_call_is_checked():
    # What would read out of bounds. The public function has its own checks.
    call, x, number = extension.load().sigmoid_loss_fwd, torch.ones(3, 2), torch.tensor(1.0)
    rest = (0, 1.0, True, True, True)
    for arguments in (
        (x, torch.ones(3, 4), number, number),
        (x, torch.ones(2, 3, 2), number, number),
        (torch.ones(0, 2), x, number, number),
        (x, torch.ones(0, 2), number, number),
        (x, x, torch.ones(1), number),
        (x, x, number, torch.ones(2)),
    ):
        with pytest.raises(ValueError, match="^sigmoid_loss: expected"):
            call(*arguments, *rest)
    with pytest.raises(TypeError, match="^sigmoid_loss: expected key to be Float, got Double"):
        call(x, x.double(), number, number, *rest)

"""Specific to the `cpu` backend: blocks, two precisions, threads, memory, Ctrl-C."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from fresh_process import run_python
from torch import Tensor

from himo_kernels import extension, pca_reconstruct, project_reconstruct
from himo_kernels import pca as run_pca
from himo_kernels import testing as hkt

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))


def values_and_gradient(x: Tensor, backend: str, threshold: float = 0.9, **options) -> list[Tensor]:
    x = x.detach().requires_grad_()
    weights = torch.linspace(-1, 2, x.numel()).sin().view(x.shape).to(x.dtype)
    values, rank = pca_reconstruct(x, threshold, backend=backend, **options)
    return [rank, values, torch.autograd.grad(values, x, weights)[0]]


def assert_as_in_float64(x: Tensor, threshold: float, **options) -> None:
    rank, *actual = values_and_gradient(x, "cpu", threshold, **options)
    exact_rank, *exact = values_and_gradient(x.double(), "reference", threshold, **options)
    assert torch.equal(rank, exact_rank)
    assert hkt.relative_error(actual[0].detach(), exact[0].detach()) <= 5e-7
    assert hkt.relative_error(actual[1], exact[1]) <= 2e-6


def decaying(*shape: int, generator: torch.Generator) -> Tensor:
    # Cheaper than power_law, which would rotate thousands of features.
    scales = torch.arange(1.0, min(shape) + 1).rsqrt()
    x = torch.randn(shape, generator=generator)
    return x * (scales if shape[1] == min(shape) else scales.unsqueeze(-1)) + 0.1


# A block holds 2^20 entries, 5,242 lines of 200.
@pytest.mark.parametrize("shape", [(5300, 200), (200, 5300)], ids=["N>D", "N<D"])
@pytest.mark.parametrize("threshold", [0.4, 0.95], ids=["few kept", "few dropped"])
@pytest.mark.parametrize("columns_first", [False, True], ids=["rows first", "columns first"])
def test_several_blocks(shape, threshold, columns_first, generator):
    x = decaying(*shape, generator=generator)
    if columns_first:
        x = x.T.contiguous().T
    assert_as_in_float64(x, threshold, gap_eps=0.0)
    assert_as_in_float64(x, threshold, differentiate_basis=False)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)], ids=["N<D", "N>D"])
def test_every_rank(shape, generator):
    # S, the factor of the matmul, holds 1 to n / 2 directions: first the kept, then the dropped.
    x = torch.randn(shape, generator=generator)
    eigenvalues = run_pca(x.double(), backend="reference").eigenvalues
    shares = eigenvalues.cumsum(-1) / eigenvalues.sum()
    ranks = set()
    for rank in range(1, min(shape)):
        threshold = float(shares[rank - 1]) - 1e-9
        assert_as_in_float64(x, threshold, gap_eps=0.0)
        ranks.add(int(pca_reconstruct(x, threshold, backend="cpu")[1]))
    assert ranks == set(range(1, min(shape)))


@pytest.mark.parametrize("smallest", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("shape", [(20, 9), (9, 20)], ids=["N>D", "N<D"])
def test_a_kept_direction_of_little_variance_keeps_the_accuracy(shape, smallest, generator):
    # In float32 such a direction is lost in the rounding of X, so the gradient is in float64.
    eigenvalues = torch.tensor([8, 4, 2, 1, smallest, smallest / 2], dtype=torch.float64)
    x = hkt.controlled_spectrum(eigenvalues, *shape, dtype=torch.float32, generator=generator)
    # Rounding of x moves the small eigenvalues: cut between the last two remaining.
    eigenvalues = run_pca(x.double(), backend="reference").eigenvalues
    cut = eigenvalues[:4].sum() + eigenvalues[4] / 2
    assert_as_in_float64(x, float(cut / eigenvalues.sum()), gap_eps=0.0)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("shape", [(3, 5), (64, 200), (200, 128)], ids=str)
def test_a_batch_is_its_problems(batch, shape, generator):
    # Large problems in excess of a multiple of the threads are solved one by one on all threads.
    x = hkt.power_law(*shape, batch=(batch,), dtype=torch.float64, generator=generator)
    together = values_and_gradient(x, "cpu", gap_eps=0.0)
    assert all(map(torch.equal, values_and_gradient(x, "cpu", gap_eps=0.0), together))
    expected = values_and_gradient(x, "reference", gap_eps=0.0)
    assert torch.equal(together[0], expected[0])
    torch.testing.assert_close(together[1:], expected[1:], rtol=0, atol=1e-9)


def test_threads_change_rounding_alone(generator):
    x = hkt.power_law(64, 200, batch=(5,), generator=generator)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values_and_gradient(x, "cpu"))
    finally:
        torch.set_num_threads(before)
    for rank, values, gradient in results[1:]:
        assert torch.equal(rank, results[0][0])
        assert hkt.relative_error(values.detach(), results[0][1].detach()) <= 5e-7
        assert hkt.relative_error(gradient, results[0][2]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_projection_of_no_and_of_every_component(dtype, generator):
    x = hkt.power_law(20, 12, dtype=dtype, generator=generator)
    p = run_pca(hkt.power_law(20, 12, dtype=dtype, generator=generator), 0.5)
    stored = p.components.shape[0]
    for rank in (0, stored):
        at_rank = p._replace(rank=torch.tensor(rank))
        results = []
        for backend in ("cpu", "reference"):
            leaves = [t.detach().requires_grad_() for t in (x, p.mean, p.components)]
            values = project_reconstruct(
                leaves[0], at_rank._replace(mean=leaves[1], components=leaves[2]), backend=backend
            )
            gradients = torch.autograd.grad(values, leaves, torch.ones_like(values))
            results.append([values.detach(), *gradients])
        eps = torch.finfo(dtype).eps
        # Sums of 20 terms of norm up to 1, which may cancel.
        torch.testing.assert_close(*results, rtol=4 * eps, atol=40 * eps)


@pytest.mark.parametrize("first, second", [("cpu", "reference"), ("reference", "cpu")])
@pytest.mark.parametrize("shape", [(24, 48), (48, 24)], ids=["N<D", "N>D"])
def test_pca_backward_accepts_the_forward_of_the_reference(first, second, shape, generator):
    x = hkt.power_law(*shape, batch=(2,), generator=generator)
    fwd, bwd = torch.ops.himo_kernels.pca_fwd, torch.ops.himo_kernels.pca_bwd
    mean, eigenvalues, components, rank, eigenvectors = fwd(
        x, torch.tensor(0.8, dtype=torch.float64), (0.0, 0.0), first
    )
    # A function of the subspace, so that the sign of an eigenvector does not matter.
    weights = torch.randn(2, shape[1], shape[1], dtype=torch.float64, generator=generator)
    incoming = (mean.sin(), eigenvalues.cos(), components @ (weights + weights.mT))
    saved = (x, mean, eigenvalues, eigenvectors, rank, 1e-6)
    actual, expected = bwd(*incoming, *saved, second), bwd(*incoming, *saved, first)
    assert hkt.relative_error(actual, expected) <= 2e-6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mean": torch.zeros(4).double()}, "expected mean of shape [3], got [4]"),
        ({"rank": torch.zeros(2).long()}, "expected rank of shape [], got [2]"),
        (
            {"eigenvectors": torch.eye(2).double()},
            "expected eigenvectors of shape [3, 3], got [2, 2]",
        ),
        ({"grad": torch.zeros(5, 4)}, "expected grad of shape [5, 3], got [5, 4]"),
        ({"x": torch.zeros(0, 3)}, "with at least one row and one column"),
        ({"eigenvalues": torch.ones(3)}, "expected eigenvalues to be Double, got Float"),
    ],
    ids=["mean", "rank", "eigenvectors", "grad", "x", "dtype"],
)
def test_a_direct_call_reads_no_memory_that_is_not_there(arguments, message):
    valid = {
        "grad": torch.zeros(5, 3),
        "x": torch.zeros(5, 3),
        "mean": torch.zeros(3).double(),
        "eigenvalues": torch.ones(3).double(),
        "eigenvectors": torch.eye(3).double(),
        "rank": torch.tensor(2),
    }
    with pytest.raises((ValueError, TypeError)) as caught:
        extension.load().pca_reconstruct_bwd(
            **{**valid, **arguments}, gap_eps=1e-6, differentiate_basis=True
        )
    assert message in str(caught.value)


# Growth of peak resident memory over one step.
PEAK = """
import sys, torch, himo_kernels
torch.set_num_threads(2)
samples, features = map(int, sys.argv[1:])
x = torch.randn(samples, features).mul_(torch.arange(1.0, features + 1).rsqrt()).requires_grad_()
weights = torch.randn(samples, features)
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
def step(rows):
    values, rank = himo_kernels.pca_reconstruct(x[:rows, :rows], backend="cpu")
    values.backward(weights[:rows, :rows])
    x.grad = None
step(300)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(max(samples, features))
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("shape", [(65536, 128), (128, 65536)], ids=["N>D", "N<D"])
def test_memory_is_that_of_the_features(shape):
    # N D float32 four times: the values, the gradient and its copy into the leaf's, and the
    # backward's coefficients (at most 2 k <= n of each line); four blocks of 8 MiB; the
    # allocator's own.
    feature_mib = shape[0] * shape[1] * 4 / 2**20
    bound_mib = 4 * feature_mib + 4 * 8 + 16
    assert bound_mib < 6 * feature_mib  # reference: the float64 copies of x and G alone are 4
    assert float(run_python("-c", PEAK, *map(str, shape))) <= bound_mib


AGAINST_REFERENCE = """
import sys, torch
from himo_kernels import pca_reconstruct, testing
generator = torch.Generator().manual_seed(int(sys.argv[1]))
worst = 0.0
for dtype, unit in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
    for shape in ((65, 133), (133, 65), (4, 16, 24)):
        x = testing.power_law(*shape[-2:], batch=shape[:-2], dtype=dtype, generator=generator)
        weights = torch.randn(shape, generator=generator)
        results = []
        for backend, raised in (("cpu", x), ("reference", x.double())):
            raised = raised.clone().requires_grad_()
            values, rank = pca_reconstruct(raised, 0.9, gap_eps=0.0, backend=backend)
            gradient, = torch.autograd.grad(values, raised, weights.to(values.dtype))
            results.append((values.detach(), gradient))
        worst = max(worst, *(testing.relative_error(a, b) / unit for a, b in zip(*results)))
print(torch.backends.cpu.get_cpu_capability(), worst)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.slow
def test_narrower_instruction_sets(capability, generator):
    seed = str(generator.initial_seed())
    printed = run_python("-c", AGAINST_REFERENCE, seed, ATEN_CPU_CAPABILITY=capability).split()
    assert printed[0].lower() == capability
    assert float(printed[1]) <= 2


LONG = """
import signal, torch, himo_kernels
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs started with &
torch.set_num_threads(2)
{before}
print("started", flush=True)
{call}
print("finished")
"""
FORWARD = {
    "before": "x = torch.randn(256, 256).expand(1500, 256, 256)",
    "call": "himo_kernels.pca_reconstruct(x, backend='cpu')",
}
BACKWARD = {
    # The time of one forward, for all: only the backward is long.
    "before": """
x = torch.randn(1, 4096, 128)
_, rank, *saved = torch.ops.himo_kernels.pca_reconstruct_fwd(x, torch.tensor(0.9), [0, 0], "cpu")
x, rank, *saved = (t.expand(600, *t.shape[1:]) for t in (x, rank, *saved))
""",
    "call": "torch.ops.himo_kernels.pca_reconstruct_bwd(x, x, *saved, rank, 1e-6, True, 'cpu')",
}


@pytest.mark.parametrize("call", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_ctrl_c_ends_a_long_batch(call):
    process = subprocess.Popen(
        [sys.executable, "-c", LONG.format(**call)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=240)
    # One problem may be slow on a busy machine; the batch must not have finished.
    assert time.monotonic() - sent < 60
    assert "finished" not in out
    assert err.rstrip().endswith("KeyboardInterrupt")

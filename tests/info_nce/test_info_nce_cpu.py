"""Specific to the `cpu` backend: memory, instruction sets, wide bfloat16, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from fresh_process import run_python
from info_nce_cases import (
    NAMES,
    Target,
    eager_losses,
    in_float64,
    losses_and_gradients,
    make_inputs,
)

import himo_kernels
from himo_kernels import extension, memory
from himo_kernels.info_nce import api
from himo_kernels.testing import relative_error

needs_extension = pytest.mark.skipif(
    extension.why_not() is not None, reason=extension.why_not() or ""
)
pytestmark = needs_extension

# Growth of peak resident memory over one step. N x N float32 is 256 MiB.
PEAK = """
import torch, himo_kernels
torch.set_num_threads(2)
samples, features = 8192, 48
image, text, component = (
    torch.nn.functional.normalize(torch.randn(samples, features), dim=-1).requires_grad_()
    for _ in range(3)
)
scale = torch.tensor(50.0, requires_grad=True)
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
def step(samples):
    losses = himo_kernels.dual_info_nce(
        image[:samples], text[:samples], component[:samples], scale, backend="cpu"
    )
    sum(losses).backward()
step(300)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(samples)
print(status("VmHWM") - before)
"""


def test_memory_is_that_of_the_features_not_of_the_logits() -> None:
    feature_mib = 8192 * 48 * 4 / 2**20
    # Factors and gradients, 12 times the features; column statistics, 128 numbers per column; the
    # workspace of 16 MiB; the allocator's overhead.
    bound_mib = 12 * feature_mib + 128 * 8192 * 4 / 2**20 + 16 + 16
    assert bound_mib < 8192**2 * 4 / 2**20 / 3
    assert float(run_python("-c", PEAK, HIMO_KERNELS_LOGITS_MIB="64")) <= bound_mib


@pytest.mark.parametrize(
    ("available_mib", "cached"), [(2048, True), (128, False), (0, False)], ids=str
)
def test_logits_are_cached_while_they_take_a_quarter_of_the_available_memory(
    available_mib: int, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HIMO_KERNELS_LOGITS_MIB", raising=False)
    monkeypatch.setattr(api, "_logits_mib", None)
    monkeypatch.setattr(memory, "available_memory", lambda: available_mib << 20)
    # Both losses of 3100 samples take 73 MiB.
    image, text, component = (torch.randn(3100, 8).requires_grad_() for _ in range(3))
    losses = himo_kernels.dual_info_nce(image, text, component, 1.0, backend="cpu")
    saved = losses[0].grad_fn.saved_tensors  # type: ignore[union-attr]
    assert ((2, 3100, 3100) in [tuple(tensor.shape) for tensor in saved]) == cached


def test_the_available_memory_is_what_the_system_says() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 20 < memory.available_memory() <= total


@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_logits_that_span_more_than_one_exponential(
    side: str, spread: float, generator: torch.Generator
) -> None:
    # Log-sum-exps of a tile differ by up to 2 scale: from 40 on its two directions take an
    # exponential each.
    samples, features, scale = 150, 40, 200.0
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(samples, features, generator=generator) + 0.5, dim=-1
        )
        for _ in range(2)
    )
    lengths = spread ** -torch.rand(samples, 1, generator=generator)
    image, text = (image * lengths, text) if side == "rows" else (image, text * lengths)
    inputs = [image, text]

    def run(*features: torch.Tensor, backend: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in features]
        loss = himo_kernels.info_nce(*leaves, scale, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    exact = run(*(x.double() for x in inputs), backend="reference")
    bound = (1 + scale / 4) * torch.finfo(torch.float32).eps * samples**0.5
    for got, expected in zip(run(*inputs, backend="cpu"), exact, strict=True):
        assert relative_error(got, expected) <= bound


needs_matrix_registers = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="the processor has no AMX"
)

AGAINST_REFERENCE = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
from info_nce_cases import NAMES, Target, losses_and_gradients, make_inputs
from himo_kernels.testing import relative_error
worst = 0.0
for name in NAMES:
    for dtype, unit in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float64, 1e-13)):
        for shape in ((65, 33), (140, 16)):
            generator = torch.Generator().manual_seed(int(sys.argv[2]))
            inputs = make_inputs(name, *shape, dtype=dtype, generator=generator)
            results = [
                losses_and_gradients(Target(name, backend, "cpu"), inputs, label_smoothing=0.1)
                for backend in ("cpu", "reference")
            ]
            (losses, gradients), (true_losses, true_gradients) = results
            got = [*losses, *gradients.values()]
            true = [*true_losses, *(true_gradients[argument] for argument in gradients)]
            worst = max(worst, *(relative_error(a, b) / unit for a, b in zip(got, true)))
print(torch.backends.cpu.get_cpu_capability(), worst)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.slow
def test_narrower_instruction_sets(capability: str, generator: torch.Generator) -> None:
    folder = str(__file__).rpartition("/")[0]
    seed = str(generator.initial_seed())
    printed = run_python(
        "-c", AGAINST_REFERENCE, folder, seed, ATEN_CPU_CAPABILITY=capability
    ).split()
    assert printed[0].lower() == capability
    # In multiples of eps: the order of sums may differ, the formula may not.
    assert float(printed[1]) <= 8


@needs_matrix_registers
def test_bfloat16_without_matrix_registers(generator: torch.Generator) -> None:
    # With AMX, oneDNN multiplies; with AMX disabled, our own kernel does.
    folder = str(__file__).rpartition("/")[0]
    seed = str(generator.initial_seed())
    printed = run_python(
        "-c", AGAINST_REFERENCE, folder, seed, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16"
    ).split()
    assert float(printed[1]) <= 8


@needs_matrix_registers
def test_matrix_registers_are_given_back(generator: torch.Generator) -> None:
    # torch's matmuls configure AMX tiles for other shapes, in the threads that ours ran in.
    inputs = make_inputs("info_nce", 300, 65, dtype=torch.bfloat16, generator=generator)
    a, b = (torch.randn(257, 129, generator=generator).bfloat16() for _ in range(2))
    product = a @ b.mT
    expected = losses_and_gradients(Target("info_nce", "cpu", "cpu"), inputs)
    for _ in range(3):
        assert torch.equal(a @ b.mT, product)
        again = losses_and_gradients(Target("info_nce", "cpu", "cpu"), inputs)
        assert torch.equal(again[0][0], expected[0][0])
        for name, gradient in again[1].items():
            assert torch.equal(gradient, expected[1][name]), name
    assert relative_error(product, a.double() @ b.double().mT) <= torch.finfo(torch.bfloat16).eps


HANDLER = """
import signal, torch, himo_kernels
torch.set_num_threads(1)
a, b = (torch.randn(257, 129).bfloat16() for _ in range(2))
x, y = (torch.randn(4096, 256).bfloat16().requires_grad_() for _ in range(2))
def step():
    loss = himo_kernels.info_nce(x, y, 1.0, keep_logits_mib=0, backend="cpu")
    return loss.detach(), *torch.autograd.grad(loss, (x, y))
product, expected = a @ b.mT, step()
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(torch.equal(a @ b.mT, product)))
for _ in range(3):
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    results = step()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert all(torch.equal(result, value) for result, value in zip(results, expected))
assert seen and all(seen)
print("equal")
"""


@needs_matrix_registers
def test_products_of_a_signal_handler() -> None:
    # Signal handlers run between tiles, while AMX is configured for our kernel.
    assert run_python("-c", HANDLER) == "equal"


INFERENCE = """
import torch, himo_kernels
from himo_kernels.testing import relative_error
torch.set_num_threads(4)
for dtype in (torch.float32, torch.bfloat16):
    for samples, features in ((300, 16), (1100, 1024)):
        x, y = (torch.randn(samples, features, dtype=torch.float32).to(dtype) for _ in range(2))
        expected = himo_kernels.info_nce(x, y, 1.0, backend="cpu")
        with torch.inference_mode():
            assert torch.equal(himo_kernels.info_nce(x, y, 1.0, backend="cpu"), expected)
        leaves = [value.requires_grad_() for value in (x, y)]
        grads = []
        for enabled in (True, False, True):
            with torch.backends.mkldnn.flags(enabled=enabled):
                loss = himo_kernels.info_nce(*leaves, 1.0, backend="cpu")
                grads.append(torch.autograd.grad(loss, leaves))
        for first, other, again in zip(*grads):
            assert torch.equal(first, again)
            # Of the whole gradient: an entry near 0 has the error of dL/dS rounded to bfloat16.
            assert relative_error(first, other) <= 1e-3
print("equal")
"""


@pytest.mark.slow
def test_inference_mode_many_threads_and_mkldnn_turned_off() -> None:
    # Panels of several columns are copied, and the kernel is chosen per call.
    assert run_python("-c", INFERENCE).strip() == "equal"


TURNED_OFF = """
import threading, torch, himo_kernels
torch.set_num_threads(1)
x, y = (torch.randn(2000, 64).bfloat16() for _ in range(2))
expected = himo_kernels.info_nce(x, y, 1.0, backend="cpu")
done = threading.Event()
def turn_off_and_on():
    while not done.is_set():
        with torch.backends.mkldnn.flags(enabled=False):
            pass
thread = threading.Thread(target=turn_off_and_on)
thread.start()
try:
    for _ in range(60):
        loss = himo_kernels.info_nce(x, y, 1.0, backend="cpu")
        torch.testing.assert_close(loss, expected)
finally:
    done.set()
print("close")
"""


@pytest.mark.slow
def test_mkldnn_turned_off_by_another_thread_during_a_call() -> None:
    assert run_python("-c", TURNED_OFF) == "close"


@pytest.mark.parametrize("name", NAMES)
def test_rounded_gradients_of_wide_bfloat16_are_no_worse_than_autocast(
    name: str, generator: torch.Generator
) -> None:
    # From 256 samples on, dL/dS is rounded to bfloat16 on machines with bfloat16 matmul.
    inputs = make_inputs(
        name, 512, 64, inner=20, scale=50.0, dtype=torch.bfloat16, generator=generator
    )
    _, exact = losses_and_gradients(eager_losses, in_float64(inputs))
    _, actual = losses_and_gradients(Target(name, "cpu", "cpu"), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, eager = losses_and_gradients(eager_losses, inputs)
    for argument, gradient in actual.items():
        error = relative_error(gradient, exact[argument])
        eager_error = relative_error(eager[argument], exact[argument])
        assert error <= max(eager_error, torch.finfo(torch.bfloat16).eps / 2), argument


def with_one_direction(features: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in features]
    loss = himo_kernels.info_nce(*leaves, 10.0, directions="rows", backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("samples", [100, 300, 600, 1100])  # up to three chunks of rows
def test_bfloat16_gradients_are_sums_rounded_once(samples: int, generator: torch.Generator) -> None:
    features = [
        torch.randn(samples, 33, generator=generator, dtype=torch.float64).div(6).bfloat16()
        for _ in range(2)
    ]
    loss, *gradients = with_one_direction(features, "cpu")
    exact_loss, *exact = with_one_direction([x.double() for x in features], "reference")
    assert relative_error(loss, exact_loss) <= 1e-6
    for gradient, expected in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        # From 256 samples on, dL/dS is rounded too.
        rounding = relative_error(expected.bfloat16(), expected)
        bound = 1.01 * rounding if samples < 256 else torch.finfo(torch.bfloat16).eps / 2
        assert relative_error(gradient, expected) <= bound


def one_element_into_memory(value: torch.Tensor) -> torch.Tensor:
    return value.new_empty(value.numel() + 1)[1:].view(value.shape).copy_(value)


def rows_of_odd_length(value: torch.Tensor) -> torch.Tensor:
    length = value.shape[1] + 1 + value.shape[1] % 2
    return value.new_zeros(len(value), length)[:, : value.shape[1]].copy_(value)


def columns_first(value: torch.Tensor) -> torch.Tensor:
    return value.mT.contiguous().mT


@pytest.mark.parametrize("layout", [one_element_into_memory, rows_of_odd_length, columns_first])
@pytest.mark.parametrize("width", [1, 64, 65])
def test_layouts_of_bfloat16_give_the_same_bits(
    layout: Callable[[torch.Tensor], torch.Tensor], width: int, generator: torch.Generator
) -> None:
    # Pairs of numbers are moved as 32 bits where their addresses allow it.
    features = [torch.randn(270, width, generator=generator).bfloat16() for _ in range(2)]
    expected = losses_and_gradients(Target("info_nce", "cpu", "cpu"), named(*features))
    laid_out = named(*map(layout, features))
    losses, gradients = losses_and_gradients(Target("info_nce", "cpu", "cpu"), laid_out)
    assert torch.equal(losses[0], expected[0][0])
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[1][name]), name


def named(image_features: torch.Tensor, text_features: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "image_features": image_features,
        "text_features": text_features,
        "logit_scale": torch.tensor(0.5),
    }


LONG = """
import signal, torch, himo_kernels
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs started with &
x = torch.randn(200_000, 64)
print("started", flush=True)
himo_kernels.info_nce(x, x, 1.0, backend="cpu")
print("finished")
"""


def test_ctrl_c_ends_a_long_call() -> None:
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

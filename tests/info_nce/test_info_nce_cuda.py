"""InfoNCE backend tests that need a GPU: real sizes, no host sync, CUDA graphs, memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from info_nce_cases import (
    NAMES,
    Inputs,
    Target,
    assert_result_within_budget,
    eager_losses,
    in_float64,
    losses_and_gradients,
    make_inputs,
)
from torch import Tensor

from himo_kernels import dual_info_nce
from himo_kernels.dispatch import OPERATORS
from himo_kernels.testing import power_law, relative_error, runnable_backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALVES = (torch.bfloat16, torch.float16)
BACKENDS = [
    pytest.param(Target(name, backend, "cuda"), id=f"{name}-{backend}")
    for name in NAMES
    for backend in OPERATORS[name].backends
    if backend not in ("cpu", "reference")
]
per_target = pytest.mark.parametrize("target", BACKENDS)
per_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def real_inputs(
    target: Target, samples: int, dtype: torch.dtype, generator: torch.Generator, width: int = 768
) -> Inputs:
    return make_inputs(
        target.operator,
        samples,
        width,
        inner=min(samples, 257),
        scale=100.0,
        dtype=dtype,
        device="cuda",
        generator=generator,
    )


@per_target
@per_dtype
@pytest.mark.parametrize("samples", [128, 1024, 2048 + 37])
@pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
def test_real_sizes_within_the_budget(target, dtype, samples, differentiate_keys, generator):
    inputs = real_inputs(target, samples, dtype, generator)
    options = {"label_smoothing": 0.1, "differentiate_keys": differentiate_keys}
    assert_result_within_budget(target, inputs, **options)


@per_target
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounded_gradients_of_the_logits(target, dtype, generator):
    # dS has 16 bits from 128 samples on: at most doubles the rounding of the gradients.
    inputs = real_inputs(target, 1024, dtype, generator)
    losses, gradients = losses_and_gradients(target, inputs)
    exact, exact_gradients = losses_and_gradients(eager_losses, in_float64(inputs))
    for loss, truth in zip(losses, exact, strict=True):
        assert relative_error(loss, truth) <= 1e-5
    for name in set(inputs) - {"logit_scale"}:
        error = relative_error(gradients[name], exact_gradients[name])
        assert error <= torch.finfo(dtype).eps / 2, name


@per_target
@per_dtype
@pytest.mark.parametrize("width", [512, 640, 770, 1152])
def test_other_widths(target, dtype, width, generator):
    inputs = real_inputs(target, 300, dtype, generator, width)
    assert_result_within_budget(target, inputs)


@per_target
@per_dtype
def test_problems_beside_each_other(target, dtype, generator):
    inputs = make_inputs(
        target.operator, 128, 96, batch=(3, 5), dtype=dtype, device="cuda", generator=generator
    )
    losses, gradients = losses_and_gradients(target, inputs)
    exact, exact_gradients = losses_and_gradients(eager_losses, in_float64(inputs))
    for loss, truth in zip(losses, exact, strict=True):
        assert relative_error(loss, truth) <= 1e-5
    for name in set(inputs) - {"logit_scale"}:
        tolerance = 1e-5 + torch.finfo(dtype).eps / 2
        assert relative_error(gradients[name], exact_gradients[name]) <= tolerance, name


@per_target
@per_dtype
def test_no_host_sync(target, dtype, generator):
    inputs = real_inputs(target, 1024, dtype, generator)
    losses_and_gradients(target, inputs, label_smoothing=0.1)  # compiles
    with no_host_sync():
        losses, _ = losses_and_gradients(target, inputs, label_smoothing=0.1)
    assert all(loss.is_cuda for loss in losses)


@per_target
@pytest.mark.parametrize("samples", [128, 1024])
def test_a_captured_graph_replays_on_new_values(target, samples, generator):
    inputs = real_inputs(target, samples, torch.bfloat16, generator)

    def step() -> list[Tensor]:
        losses, gradients = losses_and_gradients(target, inputs, label_smoothing=0.1)
        return [*losses, *gradients.values()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (100.0, 14.3):
        for name, value in real_inputs(target, samples, torch.bfloat16, generator).items():
            inputs[name].copy_(value if value.dim() else torch.tensor(scale))
        graph.replay()
        assert all(map(torch.equal, captured, step()))


@per_target
@per_dtype
@pytest.mark.parametrize("samples", [128, 1024 + 37])
def test_runs_are_bitwise_equal(target, dtype, samples, generator):
    inputs = real_inputs(target, samples, dtype, generator)
    losses, gradients = losses_and_gradients(target, inputs)
    for _ in range(20):
        again, gradients_again = losses_and_gradients(target, inputs)
        assert all(map(torch.equal, again, losses))
        for name, gradient in gradients.items():
            assert torch.equal(gradients_again[name], gradient), name


# dS has a budget of 256 MiB, and the rest is linear in N.
@pytest.mark.parametrize("samples", [16384, 32768 + 37])
@pytest.mark.parametrize("backend", ["triton"])
def test_peak_memory_of_the_dual_loss(samples, backend, generator):
    if torch.cuda.mem_get_info()[0] < 4 * 2**30:
        pytest.skip("needs 4 GiB of free GPU memory")
    image, text, component = (
        power_law(samples, 768, dtype=torch.bfloat16, device="cuda", generator=generator)
        for _ in range(3)
    )
    leaves = [value.requires_grad_() for value in (image, text, component)]
    torch.set_deterministic_debug_mode("default")  # the operator does not fill memory
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sum(dual_info_nce(*leaves, 100.0, backend=backend)).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 768 * samples * (4 * 4 + 3 * 2)  # four float32 matmuls, and the results
    assert extra <= 256 * 2**20 + gradients + 4096 * samples
    assert extra <= 0.5 * samples**2  # eager PyTorch keeps at least 16 bytes per entry


def test_offsets_past_2_31_entries(generator):
    # N^2 > 2^31: the last chunk of dS, and the last partials, start past an int32.
    if "triton" not in runnable_backends("info_nce", "cuda"):
        pytest.skip("needs the triton backend")
    if torch.cuda.mem_get_info()[0] < 4 * 2**30:
        pytest.skip("needs 4 GiB of free GPU memory")
    samples, width = 50_000, 64
    target = Target("info_nce", "triton", "cuda")
    inputs = make_inputs(
        "info_nce",
        samples,
        width,
        scale=20.0,
        dtype=torch.bfloat16,
        device="cuda",
        generator=generator,
    )
    (loss,), gradients = losses_and_gradients(target, inputs)
    image, text = (inputs[name].float() for name in ("image_features", "text_features"))
    picked = torch.tensor([0, 1, samples - 2, samples - 1], device="cuda")
    scale = inputs["logit_scale"].float()
    logits = scale * image[picked] @ text.T
    _, row_nll, column_nll = target.kernel("fwd")(*inputs.values(), 0.0, "triton")
    expected = torch.logsumexp(logits, 1) - logits.gather(1, picked[:, None])[:, 0]
    torch.testing.assert_close(row_nll[picked], expected, rtol=1e-4, atol=1e-4)
    probabilities = torch.softmax(logits, 1)
    shifted = logits - (scale * (image * text).sum(1) + column_nll)
    grad = probabilities + torch.exp(shifted)
    grad[torch.arange(4, device="cuda"), picked] -= 2
    expected_gradient = scale / (2 * samples) * grad @ text
    assert relative_error(gradients["image_features"][picked], expected_gradient) <= 1e-2
    assert loss.isfinite()

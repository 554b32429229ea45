"""Offsets past 2^31 elements: inputs spread over memory of which only a few pages are touched.

A 32-bit index reads the wrong row or faults. A copy of the whole storage shows in resident memory.
Results equal those of a compact copy, bitwise unless stated.
"""

import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import himo_kernels
from himo_kernels.dispatch import OPERATORS

FAR = 2**31  # elements: the first offset that an int32 cannot hold
SAMPLES, FEATURES = 4, 3
RESIDENT_MIB = 256  # the storages below are 4 to 24 GiB of address space
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value; Python 3.13 names it

# Strides of [SAMPLES, FEATURES] with the last entry past FAR: row strides that fit in an int32, row
# strides that do not, and column-major.
STRIDES = {
    "rows 2^30 apart": (2**30 + 16, 1),
    "rows 2^31 apart": (FAR + 16, 1),
    "columns 2^30 apart": (1, 2**30 + 16),
}

CALLS: dict[str, tuple[int, Callable[..., Any]]] = {  # number of feature arguments, call
    "covariance": (1, himo_kernels.covariance),
    "gram": (1, himo_kernels.gram),
    "pca": (1, himo_kernels.pca),
    "pca_reconstruct": (1, himo_kernels.pca_reconstruct),
    "project_reconstruct": (
        2,
        lambda x, y, backend: himo_kernels.project_reconstruct(
            x, himo_kernels.pca(y, backend="reference"), backend=backend
        ),
    ),
    "normalize": (1, lambda x, backend: (himo_kernels.normalize(x, backend=backend),)),
    "info_nce": (2, lambda *xs, backend: (himo_kernels.info_nce(*xs, 5.0, backend=backend),)),
    "dual_info_nce": (
        3,
        lambda *xs, backend: himo_kernels.dual_info_nce(*xs, 5.0, backend=backend),
    ),
    "sigmoid_loss": (
        2,
        lambda *xs, backend: (himo_kernels.sigmoid_loss(*xs, 5.0, -5.0, backend=backend),),
    ),
    "himo_loss": (2, lambda *xs, backend: himo_kernels.himo_loss(*xs, 5.0, backend=backend)),
    "dual_info_nce_low_rank": (
        3,
        lambda *xs, backend: himo_kernels.dual_info_nce_low_rank(
            *xs, torch.eye(FEATURES, dtype=xs[0].dtype), 5.0, backend=backend
        ),
    ),
}


def _address_space(elements: int, dtype: torch.dtype) -> Tensor:
    # Zeros without resident memory until written; the tests' deterministic mode fills torch.empty.
    size = elements * dtype.itemsize
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)
    except (AttributeError, OSError, OverflowError, ValueError) as error:
        pytest.skip(f"{size / 2**30:.0f} GiB of address space cannot be had: {error}")


def _spread(values: Tensor, strides: tuple[int, int]) -> Tensor:
    # Stores a matrix in memory with these strides.
    last = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    assert last >= FAR
    storage = _address_space(last + 1, values.dtype)
    return storage.as_strided(values.shape, strides).copy_(values)


def _compact(values: Tensor, strides: tuple[int, int]) -> Tensor:
    # Contiguous in the order of the strides: matmuls in another layout round differently.
    return values.contiguous() if strides[0] > strides[1] else values.mT.contiguous().mT


@contextmanager
def _resident_memory_stays_small() -> Iterator[None]:
    # VmHWM is the highest resident size since the process began, or since this reset.
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
        before = _status_mib(status.read_text(), "VmRSS")
    except OSError as error:
        pytest.skip(f"resident memory cannot be measured: {error}")
    yield
    growth = _status_mib(status.read_text(), "VmHWM") - before
    assert growth < RESIDENT_MIB, f"{growth:.0f} MiB became resident"


def _status_mib(status: str, field: str) -> float:
    found = re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)
    assert found is not None, status
    return int(found[1]) / 1024


def _outputs_and_gradients(
    call: Callable[..., Any], backend: str, inputs: list[Tensor], weights: Tensor
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = list(call(*leaves, backend=backend))
    differentiable = [output for output in outputs if output.requires_grad]
    incoming = [
        weights if output.shape == weights.shape else torch.ones_like(output)
        for output in differentiable
    ]
    incoming = [
        weight.to(output.dtype) for weight, output in zip(incoming, differentiable, strict=True)
    ]
    return [*outputs, *torch.autograd.grad(differentiable, leaves, incoming)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in CALLS for backend in OPERATORS[name].backends],
)
@pytest.mark.sample
def test_offsets_past_2_31_elements(
    name: str,
    backend: str,
    strides: tuple[int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    count, call = CALLS[name]
    values = [
        torch.randn(SAMPLES, FEATURES, generator=generator).to(dtype) for _ in range(count + 1)
    ]
    reason = OPERATORS[name].why_not(backend, *values)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with _resident_memory_stays_small():
        *far, far_weights = [_spread(value, strides) for value in values]
        actual = _outputs_and_gradients(call, backend, far, far_weights)
    *near, near_weights = [_compact(value, strides) for value in values]
    expected = _outputs_and_gradients(call, backend, near, near_weights)
    # BLAS has no stride past 2^31. If inputs are multiplied without conversion or centring, torch
    # uses its own loop, with the same terms and different rounding.
    losses = ("info_nce", "dual_info_nce", "dual_info_nce_low_rank", "sigmoid_loss", "himo_loss")
    own_loop = name in losses and dtype == torch.float32 and max(strides) >= FAR
    tolerance = {} if own_loop else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual, expected, **tolerance)
    for tensor, value in zip([*far, far_weights], values, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("backend", OPERATORS["covariance"].backends)
@pytest.mark.parametrize("name", ["covariance", "gram"])
def test_problems_of_a_batch_past_2_31_elements(
    name: str, backend: str, generator: torch.Generator
) -> None:
    values = torch.randn(3, SAMPLES, FEATURES, generator=generator)
    reason = OPERATORS[name].why_not(backend, values)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    strides = (2**30 + 16, FEATURES, 1)
    with _resident_memory_stays_small():
        storage = _address_space(2 * strides[0] + values[0].numel(), values.dtype)
        far = storage.as_strided(values.shape, strides).copy_(values)
        actual = _outputs_and_gradients(CALLS[name][1], backend, [far], values)
    expected = _outputs_and_gradients(CALLS[name][1], backend, [values], values)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)

"""The example operator of CONTRIBUTING: every backend against float64 in PyTorch."""

import pytest
import torch

from examples.minimal_operator.op import SCALE_ROWS, scale_rows
from himo_kernels.dispatch import OPERATORS
from himo_kernels.testing import assert_within_budget

del OPERATORS["scale_rows"]  # so that the tests of all operators skip the example


@pytest.mark.parametrize("backend", SCALE_ROWS.backends)
def test_scale_rows_and_its_gradients(backend: str, generator: torch.Generator) -> None:
    x, grad = torch.randn(2, 5, 12, generator=generator)[..., ::2]  # strided rows
    scale = torch.randn(5, generator=generator)
    if reason := SCALE_ROWS.why_not(backend, x, scale):
        pytest.skip(reason)

    def run(dtype: torch.dtype, function) -> tuple[torch.Tensor, ...]:
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in (x, scale)]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad.to(dtype))

    actual = run(torch.float32, lambda x, scale: scale_rows(x, scale, backend=backend))
    eager, exact = (run(d, lambda x, s: x * s[:, None]) for d in (torch.float32, torch.float64))
    for name, *values in zip(("y", "dx", "dscale"), actual, eager, exact, strict=True):
        assert_within_budget(name, *values, terms=6)


def test_scale_rows_passes_opcheck() -> None:
    arguments = (torch.ones(5, 6), torch.ones(5), "reference")
    torch.library.opcheck(torch.ops.himo_kernels.scale_rows_fwd.default, arguments)

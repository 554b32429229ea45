"""The example operator of CONTRIBUTING: every backend against float64 in PyTorch."""

import pytest
import torch

from examples.minimal_operator.op import RELU, relu
from himo_kernels.testing import assert_within_budget


@pytest.mark.parametrize("backend", RELU.backends)
def test_relu_and_its_gradient(backend: str, generator: torch.Generator) -> None:
    x, grad = torch.randn(2, 5, 12, generator=generator)[..., ::2]  # strided rows
    if reason := RELU.why_not(backend, x.requires_grad_()):
        pytest.skip(reason)
    y = relu(x, backend=backend)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert_within_budget("y", y, x * (x > 0), x.double() * (x > 0), terms=1)
    assert_within_budget("dx", dx, grad * (x > 0), grad.double() * (x > 0), terms=1)
    torch.library.opcheck(torch.ops.himo_kernels.relu_fwd.default, (x.detach(), backend))

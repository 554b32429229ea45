"""A setting that is a Python number and changes between calls does not recompile for each value.

There are two graphs, as in plain PyTorch: one with the first value as a constant, one for others.
If each value were a constant, the ninth would exceed torch.compile's limit and raise.
"""

import numpy
import pytest
import torch

import himo_kernels as hk
from himo_kernels.info_nce.api import bias_and_flag, with_logit_bias

SCALES, SHARES = [10.0, 14.3, 50.5, 100.0], [0.3, 0.55, 0.7, 0.9]
CALLS = {
    "info_nce": (hk.info_nce, SCALES),
    "sigmoid_loss": (lambda x, y, bias: hk.sigmoid_loss(x, y, 10.0, -bias), SCALES),
    "pca_reconstruct": (lambda x, y, tau: hk.pca_reconstruct(x, tau)[0], SHARES),
    "HiMoLoss": (hk.nn.HiMoLoss(), SCALES),
    "bias": (lambda x, y, bias: hk.nn.HiMoLoss()(x, y, 10.0, bias), SCALES),
    "pca": (lambda x, y, tau: hk.pca(x, tau).components, SHARES),
}
SLOW = ("HiMoLoss", "bias", "pca")


@pytest.mark.parametrize(
    "call", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else []) for c in CALLS]
)
def test_two_graphs_for_many_values(call, generator):
    function, values = CALLS[call]
    x, y = (torch.randn(6, 9, generator=generator) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for value in values:
        torch.testing.assert_close(compiled(x, y, value), function(x, y, value))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("kind", [numpy.float64, numpy.float32, numpy.int64])
def test_one_graph_for_numbers_of_numpy(kind, generator):
    x, y = (torch.randn(6, 9, generator=generator) for _ in range(2))

    def call(x, y, number):
        biased = hk.sigmoid_loss(x, y, number, -number)
        return biased + with_bias(x, y, number) + hk.info_nce(x, y, number)

    def with_bias(x, y, number):
        bias, _ = bias_and_flag("call", number, False)
        return with_logit_bias(hk.info_nce(x, y, 10.0), bias)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for value in SCALES:
        number = kind(value)
        torch.testing.assert_close(compiled(x, y, number), call(x, y, number))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

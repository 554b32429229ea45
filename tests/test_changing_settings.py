"""A setting that is a Python number and changes from call to call is compiled once for all values.

Plain PyTorch has two graphs, for the first value as a constant and for any other. Ten values that
are constants each would reach torch.compile's limit and raise.
"""

import pytest
import torch
import torch.nn.functional as F

import himo_kernels as hk

SCALES = [10.0 + 0.7 * step for step in range(10)]
SHARES = [0.3 + 0.06 * step for step in range(10)]
CALLS = {
    "plain": (lambda x, y, s: F.cross_entropy(s * x @ y.T, torch.arange(len(x))), SCALES),
    "info_nce": (hk.info_nce, SCALES),
    "pca_reconstruct": (lambda x, y, tau: hk.pca_reconstruct(x, tau)[0].square().sum(), SHARES),
    "pca": (lambda x, y, tau: hk.pca(y, tau).components.square().sum(), SHARES),
    "HiMoLoss": (hk.nn.HiMoLoss(), SCALES),
    "bias": (lambda x, y, bias: hk.nn.HiMoLoss()(x, y, 10.0, bias), SCALES),
}


@pytest.mark.parametrize("call", CALLS)
def test_few_graphs_for_many_values(call, generator):
    function, values = CALLS[call]
    x, y = (torch.randn(6, 9, generator=generator, requires_grad=True) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for value in values:
        torch.testing.assert_close(compiled(x, y, value), function(x, y, value))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

"""The Triton backend of normalize for rows larger than a program, and for several rows per program.

Without a GPU it runs in Triton's interpreter, with small blocks instead of long rows.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from himo_kernels import _triton, normalize
from himo_kernels import testing as hkt

pytest.importorskip("triton", reason="needs Triton")
from himo_kernels.normalize import triton as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.mark.skipif(
        DEVICE == "cpu" and not _triton.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
    # The interpreter computes in NumPy, which warns of intended overflows and NaNs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=[(256, 256), (256, 1024), (1024, 2048)], ids=["long", "long in 4", "even"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 64 or 256 entries of float32, one row or several."""
    monkeypatch.setattr(backend, "WIDEST_BYTES", request.param[0])
    monkeypatch.setattr(backend, "LEAST_BYTES", request.param[1])


def with_gradient(compute, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = compute(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 150), (3, 128), (2, 3, 65)], ids=str)
@pytest.mark.sample
def test_rows_longer_than_a_block(shape, dtype, generator):
    x, grad = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    x.view(-1, shape[-1])[1] = 0
    x.view(-1, shape[-1])[0, -1] = 40  # the largest entry is past the first block
    wide = x.double()
    exact = with_gradient(lambda x: F.normalize(x, dim=-1), wide, grad.double())
    exact[1].view(-1, shape[-1])[1] = 0  # F.normalize gives grad / 1e-12 there
    transposed = x.mT.contiguous().mT, grad.mT.contiguous().mT
    for inputs in ((x, grad), transposed):
        actual = with_gradient(lambda x: normalize(x, backend="triton"), *inputs)
        for name, a, e in zip(("y", "gradient"), actual, exact, strict=True):
            hkt.assert_within_budget(name, a, e.to(dtype), e, terms=1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [3, 149])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.sample
def test_what_is_not_finite_in_any_block_spoils_its_row_alone(bad, column, dtype, generator):
    x, grad = (torch.randn(5, 150, generator=generator).to(DEVICE, dtype) for _ in range(2))
    expected = with_gradient(lambda x: normalize(x, backend="triton"), x, grad)
    x[2, column] = bad
    actual = with_gradient(lambda x: normalize(x, backend="triton"), x, grad)
    for a, e in zip(actual, expected, strict=True):
        assert a[2].isnan().all()
        assert torch.equal(a[[0, 1, 3, 4]], e[[0, 1, 3, 4]])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [3e38, 1e-42])
def test_squares_leave_the_range_in_the_last_block(size, generator):
    x = torch.zeros(3, 150, device=DEVICE)
    x[1, 140:] = size
    x[2, 1] = size
    y = normalize(x, backend="triton")
    expected = torch.zeros(3, 150, device=DEVICE)
    expected[1, 140:] = 10**-0.5
    expected[2, 1] = 1
    torch.testing.assert_close(y, expected)

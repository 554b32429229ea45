"""One exponential for both directions of a tile, and the second one where the first underflows.

The texts are the identity, so the images are the logits: a tile may have any range.
"""

import pytest
import torch
from info_nce_cases import Inputs, Target, eager_losses, in_float64, losses_and_gradients
from torch import Tensor

from himo_kernels import _triton
from himo_kernels.info_nce.compose import Direction, Settings

if _triton.MISSING:
    pytest.skip(_triton.MISSING, allow_module_level=True)

import triton.language as tl

from himo_kernels.info_nce import reference
from himo_kernels.info_nce.triton import base2, info_nce_block_bwd, info_nce_block_fwd, losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = Target("info_nce", "triton", DEVICE)
SAMPLES = 40
# exp(-87) is the smallest float32 without loss of digits. Tiles take the second exponential from 42
# (softmaxes) and from 62 (sums) on.
SPREADS = pytest.mark.parametrize("spread", [0.0, 30.0, 41.0, 43.0, 61.0, 64.0, 90.0, 150.0, 700.0])

pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    # Masked lanes hold arbitrary values, about which NumPy warns and a GPU does not.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.skipif(
        DEVICE == "cpu" and not _triton.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
]


def table_of(spread: float, generator: torch.Generator) -> Tensor:
    """Logits in which row 3 is the largest of every column, but lies below its own maximum."""
    table = torch.randn(SAMPLES, SAMPLES, generator=generator)
    table[3] += 12.0
    table[3, 29] = 12.0 + spread
    return table.to(DEVICE)


def inputs_of(table: Tensor, scale: float = 1.0) -> Inputs:
    return {
        "image_features": table / scale,
        "text_features": torch.eye(SAMPLES, device=DEVICE),
        "logit_scale": torch.tensor(scale, device=DEVICE),
    }


def nlls_of(inputs: Inputs) -> list[Tensor]:
    return list(TRITON.kernel("fwd")(*inputs.values(), 0.0, "triton")[1:])


def assert_right(table: Tensor, scale: float = 1.0, differentiate_keys: bool = True) -> None:
    inputs = inputs_of(table, scale)
    exact = in_float64(inputs)
    logits = exact["logit_scale"] * exact["image_features"]
    for nll, of_rows in zip(nlls_of(inputs), (logits, logits.mT), strict=True):
        truth = of_rows.logsumexp(1) - of_rows.diagonal()
        torch.testing.assert_close(nll.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    options = {"label_smoothing": 0.1, "differentiate_keys": differentiate_keys}
    _, gradients = losses_and_gradients(TRITON, inputs, **options)
    _, truths = losses_and_gradients(eager_losses, exact, **options)
    # The image's gradient is s dS, each entry a probability / N.
    # The nll of each row is stored in float32; its rounding is a relative error of P.
    rtol = max(1e-5, table.abs().max().item() * torch.finfo(torch.float32).eps / 2)
    for name in ("image_features", "text_features"):
        largest = truths[name].abs().max()
        torch.testing.assert_close(
            gradients[name].double(), truths[name], rtol=rtol, atol=2e-6 * float(largest)
        )


@SPREADS
@pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
def test_a_column_far_below_the_largest_row(
    spread: float, differentiate_keys: bool, generator: torch.Generator
) -> None:
    assert_right(table_of(spread, generator), differentiate_keys=differentiate_keys)


@pytest.mark.parametrize("scale", [-1.0, -100.0])
def test_a_negative_scale_has_its_largest_logits_where_the_products_are_smallest(
    scale: float, generator: torch.Generator
) -> None:
    for spread in (0.0, 150.0):
        assert_right(table_of(spread, generator), scale)


@SPREADS
def test_the_same_of_a_block(spread: float, generator: torch.Generator) -> None:
    table = table_of(spread, generator)
    inputs = list(inputs_of(table).values())
    positives = table.diagonal().contiguous()
    odds = [
        block(*inputs, positives, positives, 0)
        for block in (info_nce_block_fwd, reference.info_nce_block_fwd)
    ]
    for value, truth in zip(*odds, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
    weights = torch.rand(2, SAMPLES, generator=generator).to(DEVICE)
    directions = [
        Direction(positives, torch.nn.functional.softplus(log_odds), weight)
        for log_odds, weight in zip(odds[1], weights, strict=True)
    ]
    arguments = (*inputs, *directions, 0, Settings(0.1), SAMPLES)
    found, expected = info_nce_block_bwd(*arguments), reference.info_nce_block_bwd(*arguments)
    for value, truth in zip(found, expected, strict=True):
        tolerance = 2e-6 * float(truth.abs().max())
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("spread", [0.0, 150.0])
@pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
def test_a_gradient_has_the_same_bits_alone(
    spread: float, differentiate_keys: bool, generator: torch.Generator
) -> None:
    inputs = tuple(inputs_of(table_of(spread, generator)).values())
    outputs = TRITON.kernel("fwd")(*inputs, 0.1, "triton")

    def gradients(*needs: bool) -> tuple[Tensor, ...]:
        settings = (0.1, differentiate_keys, list(needs), "triton")
        return TRITON.kernel("bwd")(outputs[0], *inputs, *outputs[1:], *settings)

    together = gradients(True, True, True)
    for index, expected in enumerate(together):
        alone = gradients(*(index == other for other in range(3)))
        assert torch.equal(alone[index], expected), index


@pytest.mark.skipif(not _triton.INTERPRETED, reason="a compiled kernel keeps its constants")
class TestOfTheBranch:
    def test_two_exponentials_give_the_same_as_one(
        self, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = inputs_of(table_of(10.0, generator))
        one = nlls_of(inputs), losses_and_gradients(TRITON, inputs)[1]
        monkeypatch.setattr(losses, "SMALLEST", tl.constexpr(float("inf")))
        monkeypatch.setattr(base2, "RANGE", tl.constexpr(float("-inf")))
        two = nlls_of(inputs), losses_and_gradients(TRITON, inputs)[1]
        for value, other in zip(*(r[0] for r in (one, two)), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)
        differs = not torch.equal(one[0][1], two[0][1])
        for name, gradient in one[1].items():
            torch.testing.assert_close(gradient, two[1][name], rtol=1e-5, atol=1e-7)
            differs |= not torch.equal(gradient, two[1][name])
        assert differs  # the branch was taken: its sums round otherwise

    @pytest.mark.parametrize("guard", ["SMALLEST", "RANGE"])
    def test_one_exponential_would_lose_a_column(
        self, guard: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, never = {"SMALLEST": (losses, 0.0), "RANGE": (base2, float("inf"))}[guard]
        monkeypatch.setattr(module, guard, tl.constexpr(never))
        with pytest.raises(AssertionError):
            assert_right(table_of(150.0, generator))

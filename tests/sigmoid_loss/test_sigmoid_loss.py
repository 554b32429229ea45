"""sigmoid_loss against SigLIP's formula, a hand-worked case, and extreme values."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import (
    Target,
    assert_equal_to,
    in_float64,
    losses_and_gradients,
    targets,
    targets_by_dtype,
)
from sigmoid_cases import NAME, assert_result_within_budget, eager_loss, sigmoid_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import himo_kernels
from himo_kernels.sigmoid_loss import reference
from himo_kernels.sigmoid_loss.op import BLOCK
from himo_kernels.testing import relative_error

EXACT = 1e-12  # float64 against float64, for losses and gradients of order 1
SHAPES = [(1, 5), (1, 1), (2, 3), (7, 1), (33, 8), (8, 33), (64, 64), (300, 24)]
# At the start of training, in its middle, and far outside.
SETTINGS = [(10.0, -10.0), (117.3, -12.9), (100.0, -100.0), (100.0, 0.0), (0.0, 0.0), (-7.0, 3.0)]
EXTREMES = [(1.0, 1e4), (1.0, -1e4), (1e4, 0.0), (-1e4, 1e4), (1e4, -1e4)]

per_target = pytest.mark.parametrize("target", targets(NAME, dtype=torch.float64))
per_target32 = pytest.mark.parametrize("target", targets(NAME))


def by_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class TestAgainstTheFormula:
    @per_target
    @pytest.mark.parametrize("shape", SHAPES, ids=by_shape)
    @pytest.mark.parametrize("scale, bias", SETTINGS)
    def test_loss_and_gradients(
        self,
        target: Target,
        shape: tuple[int, int],
        scale: float,
        bias: float,
        generator: torch.Generator,
    ) -> None:
        inputs = sigmoid_inputs(
            *shape, scale=scale, bias=bias, device=target.device, generator=generator
        )
        assert_equal_to(
            losses_and_gradients(target, inputs), losses_and_gradients(eager_loss, inputs), EXACT
        )

    @per_target
    @pytest.mark.parametrize("batch", [(2,), (2, 3), (1, 1, 2)], ids=by_shape)
    def test_leading_dimensions_are_independent_problems(
        self, target: Target, batch: tuple[int, ...], generator: torch.Generator
    ) -> None:
        inputs = sigmoid_inputs(6, 9, batch=batch, device=target.device, generator=generator)
        # A different weight per problem, to detect a gradient that mixes problems.
        weights = (torch.randn(batch, dtype=torch.float64, generator=generator).to(target.device),)
        assert_equal_to(
            losses_and_gradients(target, inputs, weights),
            losses_and_gradients(eager_loss, inputs, weights),
            EXACT,
        )

    @per_target
    def test_no_problem_at_all(self, target: Target) -> None:
        inputs = sigmoid_inputs(6, 9, batch=(0,), device=target.device)
        (loss,), gradients = losses_and_gradients(target, inputs)
        assert loss.shape == (0,)
        assert gradients["logit_scale"] == gradients["logit_bias"] == 0

    @per_target
    def test_gradcheck(self, target: Target, generator: torch.Generator) -> None:
        for shape in ((1, 2), (3, 5), (5, 3)):
            inputs = sigmoid_inputs(
                *shape, scale=3.0, bias=-1.0, device=target.device, generator=generator
            )

            def call(*values: Tensor) -> Tensor:
                return target(**dict(zip(inputs, values, strict=True)))[0]  # noqa: B023

            leaves = [value.requires_grad_() for value in inputs.values()]
            assert torch.autograd.gradcheck(call, leaves, atol=1e-6, rtol=1e-5)


@per_target
def test_worked_by_hand(target: Target) -> None:
    # l = ln 2 [[2, 1], [0, 3]] + ln 2 = ln [[8, 4], [2, 16]]. -log sigmoid(ln x) = log(1 + 1 / x),
    # and of a negative pair log(1 + x). dL/dl = -1 / (1 + x) / 2 or x / (1 + x) / 2.
    inputs = {
        "image_features": [[1.0, 0.0], [0.0, 1.0]],
        "text_features": [[2.0, 0.0], [1.0, 3.0]],
        "logit_scale": math.log(2),
        "logit_bias": math.log(2),
    }
    tensors = {
        name: torch.tensor(value, dtype=torch.float64, device=target.device)
        for name, value in inputs.items()
    }
    (loss,), gradients = losses_and_gradients(target, tensors)
    expected = math.log(9 / 8) + math.log(5) + math.log(3) + math.log(17 / 16)
    assert loss.item() == pytest.approx(expected / 2, rel=EXACT)
    of_logits = [[-1 / 18, 4 / 10], [2 / 6, -1 / 34]]
    of_products = torch.tensor(of_logits, dtype=torch.float64, device=target.device)
    products = tensors["text_features"].T  # V is the identity
    scale = math.log(2)
    for name, by_hand in {
        "image_features": scale * of_products @ tensors["text_features"],
        "text_features": scale * of_products.T,
        "logit_scale": (of_products * products).sum(),
        "logit_bias": of_products.sum(),
    }.items():
        torch.testing.assert_close(gradients[name], by_hand, rtol=EXACT, atol=EXACT)


class TestPrecision:
    @targets_by_dtype(NAME)
    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    @pytest.mark.parametrize("scale, bias", SETTINGS[:4])
    def test_within_the_budget(
        self,
        target: Target,
        dtype: torch.dtype,
        autocast: bool,
        scale: float,
        bias: float,
        generator: torch.Generator,
    ) -> None:
        for shape in ((1, 16), (33, 20), (160, 48), (270, 5)):
            inputs = sigmoid_inputs(
                *shape,
                scale=scale,
                bias=bias,
                dtype=dtype,
                device=target.device,
                generator=generator,
            )
            assert_result_within_budget(target, inputs, autocast)

    @targets_by_dtype(NAME)
    @pytest.mark.parametrize("scale, bias", EXTREMES)
    def test_extremes_are_finite_and_right(
        self,
        target: Target,
        dtype: torch.dtype,
        scale: float,
        bias: float,
        generator: torch.Generator,
    ) -> None:
        inputs = sigmoid_inputs(
            24, 16, scale=scale, bias=bias, dtype=dtype, device=target.device, generator=generator
        )
        (loss,), gradients = losses_and_gradients(target, inputs)
        (exact,), exact_gradients = losses_and_gradients(eager_loss, in_float64(inputs))
        assert relative_error(loss, exact) <= 1e-6
        # A logit near 1e4 is off by up to 1e4 eps of float32, and where it is near 0 so is the
        # gradient.
        for name, gradient in gradients.items():
            tolerance = 4 * (abs(scale) + abs(bias)) * torch.finfo(torch.float32).eps
            tolerance += torch.finfo(gradient.dtype).eps
            assert gradient.isfinite().all(), name
            assert relative_error(gradient, exact_gradients[name]) <= tolerance, name

    @per_target32
    def test_small_losses_keep_their_digits(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # Every pair is right with a logit of 20: log(1 + exp(-20)) is 2e-9, of which 1 + 2e-9 in
        # float32 would keep nothing.
        eye = torch.eye(12, device=target.device)
        arguments = (eye, eye, 40.0, -20.0)
        (loss,) = target(**dict(zip(sigmoid_inputs(1, 1), arguments, strict=True)))
        assert loss.item() == pytest.approx(12 * math.log1p(math.exp(-20)), rel=1e-6)


class TestNotFinite:
    @per_target32
    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
    @pytest.mark.parametrize("samples", [1, 5, 40])
    def test_non_finite_in_gives_non_finite_out(
        self, target: Target, value: float, samples: int, generator: torch.Generator
    ) -> None:
        inputs = sigmoid_inputs(
            samples, 4, dtype=torch.float32, device=target.device, generator=generator
        )
        for name in inputs:
            spoiled = {key: tensor.clone() for key, tensor in inputs.items()}
            spoiled[name].view(-1)[-1] = value
            (loss,), gradients = losses_and_gradients(target, spoiled)
            (expected,), expected_gradients = losses_and_gradients(eager_loss, spoiled)
            assert loss.isnan() == expected.isnan() and loss.isfinite() == expected.isfinite()
            for key, gradient in expected_gradients.items():
                if gradient.isnan().all():
                    assert gradients[key].isnan().all(), f"{name}: {key}"

    @per_target32
    def test_check_finite_names_argument_and_index(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = sigmoid_inputs(
            5, 4, dtype=torch.float32, device=target.device, generator=generator
        )
        target(**inputs, check_finite=True)
        for name, place in {
            "image_features": " at [4, 3]",
            "text_features": " at [4, 3]",
            "logit_scale": "",
            "logit_bias": "",
        }.items():
            spoiled = {key: tensor.clone() for key, tensor in inputs.items()}
            spoiled[name].view(-1)[-1] = math.nan
            with pytest.raises(ValueError) as caught:
                target(**spoiled, check_finite=True)
            message = f"sigmoid_loss: expected {name} to be finite, got nan{place}"
            assert str(caught.value) == message


class Asked(TorchDispatchMode):
    """Records which gradients each call of the operator is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.needs_grad: list[list[bool]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "himo_kernels":
            self.needs_grad.append(list(args[4]))
        return op(*args, **(kwargs or {}))


class TestAutograd:
    @per_target32
    def test_the_kernel_is_told_what_is_needed(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = sigmoid_inputs(
            9, 4, dtype=torch.float32, device=target.device, generator=generator
        )
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        with Asked() as asked:
            target(**inputs)
            with torch.no_grad():
                target(**leaves)
            leaves["text_features"] = inputs["text_features"]
            (loss,) = target(**leaves)
        assert asked.needs_grad == [[False] * 4, [False] * 4, [True, False, True, True]]
        assert [saved.numel() for saved in loss.grad_fn.saved_tensors] == [36, 0, 1, 1]

    @per_target32
    def test_the_loss_may_be_changed_in_place(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # The gradients are saved, and share no memory with it.
        inputs = sigmoid_inputs(
            9, 4, dtype=torch.float32, device=target.device, generator=generator
        )
        _, expected = losses_and_gradients(target, inputs)
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        (loss,) = target(**leaves)
        loss *= 2
        for name, gradient in zip(
            leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True
        ):
            torch.testing.assert_close(gradient, 2 * expected[name])

    @targets_by_dtype(NAME, dtypes=[torch.bfloat16])
    def test_gradients_have_the_shape_and_dtype_of_their_inputs(
        self, target: Target, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        inputs = sigmoid_inputs(9, 6, dtype=dtype, device=target.device, generator=generator)
        _, expected = losses_and_gradients(target, inputs)
        inputs["logit_scale"] = inputs["logit_scale"].double().reshape(1, 1)
        inputs["logit_bias"] = inputs["logit_bias"].bfloat16().reshape(1)
        (loss,), gradients = losses_and_gradients(target, inputs)
        assert loss.dtype == torch.float32
        for name, value in inputs.items():
            assert (gradients[name].shape, gradients[name].dtype) == (value.shape, value.dtype)
            torch.testing.assert_close(
                gradients[name].reshape(expected[name].shape), expected[name].to(value.dtype)
            )

    @per_target32
    def test_numbers_and_tensors_give_one_loss(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = sigmoid_inputs(
            9, 6, dtype=torch.float32, device=target.device, generator=generator
        )
        expected = target(**inputs)[0]
        for form in (float, int, lambda value: torch.tensor([value], device=target.device)):
            assert torch.equal(
                target(**{**inputs, "logit_scale": form(10.0), "logit_bias": form(-10.0)})[0],
                expected,
            )

    @per_target
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
    def test_strides_do_not_matter(
        self, target: Target, layout: str, generator: torch.Generator
    ) -> None:
        inputs = sigmoid_inputs(20, 17, batch=(2,), device=target.device, generator=generator)

        def laid_out(x: Tensor) -> Tensor:
            if x.dim() < 2:
                return x
            if layout == "transposed":
                return x.mT.contiguous().mT
            if layout == "expanded":
                return x[:1].expand(x.shape)
            return torch.stack([x, -x], -1).flatten(-2)[..., ::2]

        strided = {name: laid_out(value) for name, value in inputs.items()}
        plain = {name: value.contiguous() for name, value in strided.items()}
        assert_equal_to(
            losses_and_gradients(target, strided), losses_and_gradients(eager_loss, plain), EXACT
        )

    @per_target
    def test_one_tensor_as_both_features(self, target: Target, generator: torch.Generator) -> None:
        inputs = sigmoid_inputs(8, 5, device=target.device, generator=generator)
        x = inputs["image_features"].requires_grad_()
        rest = (inputs["logit_scale"], inputs["logit_bias"])
        loss = himo_kernels.sigmoid_loss(x, x, *rest, backend=target.backend)
        (expected,) = eager_loss(x, x, *rest)
        torch.testing.assert_close(
            torch.autograd.grad(loss, x), torch.autograd.grad(expected, x), rtol=EXACT, atol=EXACT
        )


BLOCKS = [name for name in BLOCK.backends if name != "triton"]


@pytest.mark.parametrize("backend", BLOCKS)
def test_blocks_add_up_to_the_batch(backend: str, generator: torch.Generator) -> None:
    # Pairs on the diagonal of a block, off its diagonal, and in none of its rows.
    inputs = sigmoid_inputs(45, 10, generator=generator)
    if reason := BLOCK.why_not(backend, *inputs.values()):
        pytest.skip(reason)
    images, texts, *rest = inputs.values()
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    of_images, of_texts = torch.zeros_like(images), torch.zeros_like(texts)
    for rows in (slice(0, 13), slice(13, 14), slice(14, 45)):
        for columns in (slice(0, 20), slice(20, 45)):
            arguments = (images[rows], texts[columns], *rest, rows.start - columns.start)
            loss, to_images, to_texts, *scalars = BLOCK.run("fwd", *arguments, [True] * 4, backend)
            of_images[rows] += to_images
            of_texts[columns] += to_texts
            for total, part in zip(sums, (loss, *scalars), strict=True):
                total += part
    found = ((sums[0] / 45,), dict(zip(inputs, (of_images, of_texts, *sums[1:]), strict=True)))
    found = (found[0], {name: value / 45 for name, value in found[1].items()})
    assert_equal_to(found, losses_and_gradients(eager_loss, inputs), EXACT)


def test_reference_holds_a_bounded_part_of_the_logits(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = sigmoid_inputs(45, 10, batch=(2,), generator=generator)
    target = Target(NAME, "reference", "cpu")
    expected = losses_and_gradients(target, inputs)
    monkeypatch.setattr("himo_kernels.info_nce.reference._BLOCK_LOGITS", 1)
    sizes = []
    logsigmoid = F.logsigmoid
    monkeypatch.setattr(
        reference.F, "logsigmoid", lambda x: (sizes.append(x.numel()), logsigmoid(x))[1]
    )
    assert_equal_to(losses_and_gradients(target, inputs), expected, EXACT)
    assert max(sizes) <= inputs["image_features"].numel() and len(sizes) > 1

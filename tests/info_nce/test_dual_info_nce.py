"""The dual forms: two losses in one operator, components in full or as low-rank factors."""

import math

import pytest
import torch
from info_nce_cases import (
    DUAL_NAMES,
    Gradients,
    Inputs,
    Losses,
    Target,
    assert_equal_to,
    in_float64,
    losses_and_gradients,
    make_inputs,
    targets,
)
from torch import Tensor

from himo_kernels import dual_info_nce, info_nce, pca, pca_reconstruct, project_reconstruct
from himo_kernels.testing import power_law, relative_error

EXACT = 1e-12
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 4), (2, 3), (9, 5), (5, 9), (40, 33)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)


def float64_targets(*operators: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("target", targets(*operators, dtype=torch.float64))


def random_weights(inputs: Inputs, generator: torch.Generator, losses: int = 2) -> Losses:
    image = inputs["image_features"]
    return tuple(
        torch.randn(image.shape[:-2], dtype=torch.float64, generator=generator).to(image.device)
        for _ in range(losses)
    )


class TestDualIsTwoLosses:
    @float64_targets("dual_info_nce")
    @SHAPES
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    def test_equal_to_two_calls_of_info_nce(
        self,
        target: Target,
        shape: tuple[int, int],
        differentiate_keys: bool,
        generator: torch.Generator,
    ) -> None:
        def two_calls(component_features: Tensor, **inputs: Tensor) -> Losses:
            image, scale = inputs["image_features"], inputs["logit_scale"]
            options = {"label_smoothing": 0.1, "differentiate_keys": differentiate_keys}
            return (
                info_nce(image, inputs["text_features"], scale, **options, backend="reference"),
                info_nce(image, component_features, scale, **options, backend="reference"),
            )

        inputs = make_inputs(target.operator, *shape, device=target.device, generator=generator)
        weights = random_weights(inputs, generator)
        assert_equal_to(
            losses_and_gradients(
                target,
                inputs,
                weights,
                label_smoothing=0.1,
                differentiate_keys=differentiate_keys,
            ),
            losses_and_gradients(two_calls, inputs, weights),
            EXACT,
        )

    @pytest.mark.parametrize("target", targets("dual_info_nce"))
    def test_components_equal_to_texts_give_one_loss_twice(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 24, 16, dtype=torch.float32, device=target.device, generator=generator
        )
        inputs["component_features"] = inputs["text_features"]
        (global_loss, component_loss), gradients = losses_and_gradients(target, inputs)
        assert torch.equal(global_loss, component_loss)
        assert torch.equal(gradients["text_features"], gradients["component_features"])

    @float64_targets(*DUAL_NAMES)
    def test_weights_of_the_losses_scale_their_gradients(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 6, 7, batch=(3,), device=target.device, generator=generator
        )
        weights = random_weights(inputs, generator)
        none = torch.zeros_like(weights[0])
        _, both = losses_and_gradients(target, inputs, weights)
        _, first = losses_and_gradients(target, inputs, (weights[0], none))
        _, second = losses_and_gradients(target, inputs, (none, weights[1]))
        for name, gradient in both.items():
            assert relative_error(first[name] + second[name], gradient) <= EXACT, name

    @float64_targets(*DUAL_NAMES)
    def test_a_loss_left_out_of_the_sum_gives_no_gradient(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 6, 7, batch=(3,), device=target.device, generator=generator
        )
        weights = random_weights(inputs, generator)
        none = torch.zeros_like(weights[0])

        def only(index: int) -> Gradients:
            # An unused output has no gradient at all, unlike one with a weight of zero.
            leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
            target(**leaves)[index].backward(weights[index])
            return {name: leaf.grad for name, leaf in leaves.items()}

        _, first = losses_and_gradients(target, inputs, (weights[0], none))
        _, second = losses_and_gradients(target, inputs, (none, weights[1]))
        for index, expected in enumerate((first, second)):
            for name, gradient in only(index).items():
                assert torch.equal(gradient, expected[name]), f"loss {index}: {name}"
        factors = set(inputs) - {"image_features", "text_features", "logit_scale"}
        assert not any(first[name].any() for name in factors)
        assert not second["text_features"].any()


class TestLowRank:
    @float64_targets("dual_info_nce_low_rank")
    @SHAPES
    @pytest.mark.parametrize("inner", [1, 4, 12], ids="K={}".format)
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    def test_equal_to_dual_of_the_product(
        self,
        target: Target,
        shape: tuple[int, int],
        inner: int,
        differentiate_keys: bool,
        generator: torch.Generator,
    ) -> None:
        inputs = make_inputs(
            target.operator, *shape, inner=inner, device=target.device, generator=generator
        )
        weights = random_weights(inputs, generator)
        options = {"label_smoothing": 0.1, "differentiate_keys": differentiate_keys}
        assert_equal_to(
            losses_and_gradients(target, inputs, weights, **options),
            losses_and_gradients(dual_of_product, inputs, weights, **options),
            EXACT,
        )

    @float64_targets("dual_info_nce_low_rank")
    @pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=["one", "B", "BxB"])
    @pytest.mark.parametrize(
        "ignored", [0.0, 1e30, math.inf, math.nan], ids="past-the-rank={}".format
    )
    def test_columns_past_the_rank_are_ignored(
        self,
        target: Target,
        batch: tuple[int, ...],
        ignored: float,
        generator: torch.Generator,
    ) -> None:
        inner = 4
        inputs = make_inputs(
            target.operator,
            6,
            5,
            batch=batch,
            inner=inner,
            device=target.device,
            generator=generator,
        )
        # 0 keeps nothing, inner keeps all; every problem of a batch has its own rank.
        rank = torch.randint(inner + 1, batch, generator=generator).to(target.device)
        past = torch.arange(inner, device=target.device) >= rank[..., None]  # [*, K]
        clean = dict(inputs)
        clean["coefficients"] = inputs["coefficients"].masked_fill(past[..., None, :], 0.0)
        inputs["coefficients"] = inputs["coefficients"].masked_fill(past[..., None, :], ignored)
        # Rows of the basis that belong to ignored columns are ignored too.
        inputs["basis"] = inputs["basis"].masked_fill(past[..., None], ignored)
        clean["basis"] = inputs["basis"].masked_fill(past[..., None], 0.0)
        weights = random_weights(inputs, generator)
        losses, gradients = losses_and_gradients(target, inputs, weights, rank=rank)
        assert_equal_to(
            (losses, gradients), losses_and_gradients(dual_of_product, clean, weights), EXACT
        )
        assert not gradients["coefficients"].mT[past].any()
        assert not gradients["basis"][past].any()

    @float64_targets("dual_info_nce_low_rank")
    def test_rank_zero_leaves_components_of_zero(
        self, target: Target, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(target.operator, 7, 5, device=target.device, generator=generator)
        rank = torch.zeros((), dtype=torch.int64, device=target.device)
        _, component_loss = target(**inputs, rank=rank)
        assert component_loss.item() == pytest.approx(math.log(7), rel=1e-15)

    @pytest.mark.parametrize("target", targets("dual_info_nce_low_rank", dtype=torch.bfloat16))
    def test_components_of_half_precision_factors_are_not_rounded(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # The product is in float32; rounding it to bfloat16 would change each logit by 3e-3.
        inputs = make_inputs(
            target.operator,
            32,
            48,
            inner=9,
            scale=100.0,
            dtype=torch.bfloat16,
            device=target.device,
            generator=generator,
        )
        (_, loss), (_, exact) = target(**inputs), dual_of_product(**in_float64(inputs))
        assert relative_error(loss, exact) <= 1e-5


def dual_of_product(
    image_features: Tensor,
    text_features: Tensor,
    coefficients: Tensor,
    basis: Tensor,
    logit_scale: Tensor,
    **options: object,
) -> Losses:
    return dual_info_nce(
        image_features,
        text_features,
        coefficients @ basis,
        logit_scale,
        backend="reference",
        **options,
    )


@float64_targets("dual_info_nce_low_rank")
@pytest.mark.parametrize(
    "shape",
    [(24, 9), (12, 12), (9, 24), (2, 16, 7), (2, 3, 5, 8)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0], ids="tau={}".format)
class TestPrincipalComponents:
    """The factors of a PCA: the mean as one more row of the basis, as the docstring gives them."""

    def inputs(self, target: Target, shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
        *batch, samples, features = shape
        return make_inputs(
            "info_nce",
            samples,
            features,
            batch=tuple(batch),
            device=target.device,
            generator=generator,
        )

    def factors(self, text: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, _, components, rank, _ = pca(text, threshold)
        mean = mean.unsqueeze(-2)
        coefficients = (text - mean) @ components.mT
        ones = torch.ones_like(coefficients[..., :1])
        return (
            torch.cat([ones, coefficients], -1),
            torch.cat([mean, components], -2),
            rank + 1,
        )

    def test_equal_to_dual_of_the_reconstruction(
        self,
        target: Target,
        shape: tuple[int, ...],
        threshold: float,
        generator: torch.Generator,
    ) -> None:
        def by_factors(
            image_features: Tensor, text_features: Tensor, logit_scale: Tensor
        ) -> Losses:
            coefficients, basis, rank = self.factors(text_features, threshold)
            return target(
                image_features=image_features,
                text_features=text_features,
                coefficients=coefficients,
                basis=basis,
                logit_scale=logit_scale,
                rank=rank,
            )

        def by_projection(
            image_features: Tensor, text_features: Tensor, logit_scale: Tensor
        ) -> Losses:
            component = project_reconstruct(text_features, pca(text_features, threshold))
            return dual_info_nce(
                image_features, text_features, component, logit_scale, backend="reference"
            )

        def fused(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Losses:
            component, _ = pca_reconstruct(text_features, threshold)
            return dual_info_nce(
                image_features, text_features, component, logit_scale, backend="reference"
            )

        inputs = self.inputs(target, shape, generator)
        weights = random_weights(inputs, generator)
        actual = losses_and_gradients(by_factors, inputs, weights)
        for other in (by_projection, fused):
            assert_equal_to(actual, losses_and_gradients(other, inputs, weights), 1e-10)

    def test_a_factor_for_each_row_normalises_the_components(
        self,
        target: Target,
        shape: tuple[int, ...],
        threshold: float,
        generator: torch.Generator,
    ) -> None:
        def by_factors(
            image_features: Tensor, text_features: Tensor, logit_scale: Tensor
        ) -> Losses:
            coefficients, basis, rank = self.factors(text_features, threshold)
            length = (coefficients @ basis).norm(dim=-1, keepdim=True)
            return target(
                image_features=image_features,
                text_features=text_features,
                coefficients=coefficients / length,
                basis=basis,
                logit_scale=logit_scale,
                rank=rank,
            )

        def by_reconstruction(
            image_features: Tensor, text_features: Tensor, logit_scale: Tensor
        ) -> Losses:
            component, _ = pca_reconstruct(text_features, threshold)
            component = torch.nn.functional.normalize(component, dim=-1)
            return dual_info_nce(
                image_features, text_features, component, logit_scale, backend="reference"
            )

        inputs = self.inputs(target, shape, generator)
        weights = random_weights(inputs, generator)
        assert_equal_to(
            losses_and_gradients(by_factors, inputs, weights),
            losses_and_gradients(by_reconstruction, inputs, weights),
            1e-10,
        )


@pytest.mark.parametrize("target", targets("dual_info_nce", dtype=torch.bfloat16))
def test_image_gradient_in_half_precision_is_the_rounded_sum(
    target: Target, generator: torch.Generator
) -> None:
    # One rounding for both losses together: the gradient is the float64 gradient in bfloat16, up to
    # float32 noise that can break a tie.
    inputs = make_inputs(target.operator, 32, 24, dtype=torch.bfloat16, generator=generator)
    inputs = {name: value.to(target.device) for name, value in inputs.items()}
    _, gradients = losses_and_gradients(target, inputs)
    _, exact = losses_and_gradients(
        lambda **arguments: dual_info_nce(**arguments, backend="reference"), in_float64(inputs)
    )
    rounded = exact["image_features"].to(torch.bfloat16)
    differs = gradients["image_features"] != rounded
    assert differs.float().mean() <= 0.01


@pytest.mark.parametrize("target", targets("dual_info_nce"))
def test_a_common_component_has_no_say(target: Target, generator: torch.Generator) -> None:
    # All components equal (tau so low that only the mean remains): every text is equally likely
    # for an image, and the row losses are log N for any images.
    inputs = make_inputs(
        target.operator, 16, 12, scale=100.0, dtype=torch.float32, generator=generator
    )
    common = power_law(1, 12, generator=generator).expand(16, 12)
    inputs["component_features"] = common
    inputs = {name: value.to(target.device) for name, value in inputs.items()}
    *_, row_nll, _ = target.kernel("fwd")(*inputs.values(), 0.0, target.backend)
    torch.testing.assert_close(row_nll, torch.full_like(row_nll, math.log(16)))

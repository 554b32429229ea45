"""info_nce and its dual forms against F.cross_entropy, a hand-worked case, and extreme values."""

import math

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import (
    NAMES,
    Target,
    assert_equal_to,
    eager_losses,
    in_float64,
    losses_and_gradients,
    make_inputs,
    targets,
    targets_by_dtype,
)

from himo_kernels.testing import confident_positives, equal_rows, power_law, relative_error

EXACT = 1e-12  # float64 against float64, for losses and gradients of order 1

# (N, D): one pair, two pairs, width 1, both sides of N = D, ragged, and tile-even.
SHAPES = [(1, 5), (1, 1), (2, 3), (7, 1), (33, 8), (8, 33), (64, 64), (252, 123)]

# Which loss of the dual forms reads an argument, if not both.
READ_BY = {"text_features": (0,), "component_features": (1,), "coefficients": (1,), "basis": (1,)}


def by_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class TestAgainstCrossEntropy:
    @pytest.mark.parametrize("target", targets(*NAMES, dtype=torch.float64))
    @pytest.mark.parametrize("shape", SHAPES, ids=by_shape)
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0], ids="smoothing={}".format)
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    def test_loss_and_gradients(
        self,
        target: Target,
        shape: tuple[int, int],
        label_smoothing: float,
        differentiate_keys: bool,
        generator: torch.Generator,
    ) -> None:
        inputs = make_inputs(target.operator, *shape, device=target.device, generator=generator)
        options = {"label_smoothing": label_smoothing, "differentiate_keys": differentiate_keys}
        assert_equal_to(
            losses_and_gradients(target, inputs, **options),
            losses_and_gradients(eager_losses, inputs, **options),
            EXACT,
        )

    @pytest.mark.parametrize("target", targets(*NAMES, dtype=torch.float64))
    @pytest.mark.parametrize("batch", [(2,), (2, 3), (1, 1, 2), (0,)], ids=by_shape)
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    def test_leading_dimensions_are_independent_problems(
        self,
        target: Target,
        batch: tuple[int, ...],
        differentiate_keys: bool,
        generator: torch.Generator,
    ) -> None:
        inputs = make_inputs(
            target.operator, 6, 9, batch=batch, device=target.device, generator=generator
        )
        losses = target(**inputs)
        assert all(loss.shape == batch for loss in losses)
        if 0 in batch:
            return
        options = {"label_smoothing": 0.1, "differentiate_keys": differentiate_keys}
        # A different weight per problem, to detect a gradient that mixes problems.
        weights = tuple(
            torch.randn(batch, dtype=torch.float64, generator=generator).to(target.device)
            for _ in losses
        )
        assert_equal_to(
            losses_and_gradients(target, inputs, weights, **options),
            losses_and_gradients(eager_losses, inputs, weights, **options),
            EXACT,
        )

    @pytest.mark.parametrize("target", targets(*NAMES, dtype=torch.float64))
    def test_forward_keeps_the_nll_of_each_row_and_column(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # The operator defines what the backward reads, so that backends can be mixed.
        inputs = make_inputs(target.operator, 12, 7, device=target.device, generator=generator)
        texts = [inputs["text_features"]]
        arguments = list(inputs.values())
        if target.operator == "dual_info_nce":
            texts.append(inputs["component_features"])
        if target.operator == "dual_info_nce_low_rank":
            texts.append(inputs["coefficients"] @ inputs["basis"])
            arguments.insert(4, torch.tensor(3, device=target.device))  # all columns
        outputs = target.kernel("fwd")(*arguments, 0.1, target.backend)
        labels = torch.arange(12, device=target.device)
        for text, (_, row_nll, column_nll) in zip(texts, [outputs[:3], outputs[3:]], strict=False):
            logits = inputs["logit_scale"] * inputs["image_features"] @ text.T
            for nll, table in ((row_nll, logits), (column_nll, logits.T)):
                expected = F.cross_entropy(table, labels, reduction="none")
                torch.testing.assert_close(nll, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("target", targets("info_nce", dtype=torch.float64))
class TestWorkedByHand:
    """Two pairs with V = I and exp(S) = 2^(V U^T) = [[4, 2], [1, 8]].

    Row probabilities [[2/3, 1/3], [1/9, 8/9]], column probabilities [[4/5, 1/5], [1/5, 4/5]].
    dL/dS = (P_rows - I + P_columns - I) / 4 = [[-2/15, 2/15], [7/90, -7/90]].
    """

    SCALE = math.log(2)

    def result(self, target: Target, **options: object):
        inputs = {
            "image_features": [[1.0, 0.0], [0.0, 1.0]],
            "text_features": [[2.0, 0.0], [1.0, 3.0]],
            "logit_scale": self.SCALE,
        }
        tensors = {
            name: torch.tensor(value, dtype=torch.float64, device=target.device)
            for name, value in inputs.items()
        }
        (loss,), gradients = losses_and_gradients(target, tensors, **options)
        return loss.item(), {name: value.tolist() for name, value in gradients.items()}

    def test_loss_and_gradients(self, target: Target) -> None:
        loss, gradients = self.result(target)
        rows, columns = math.log(3 / 2) + math.log(9 / 8), 2 * math.log(5 / 4)
        assert loss == pytest.approx((rows + columns) / 4, rel=EXACT)
        s = self.SCALE
        image = [[-s * 2 / 15, s * 6 / 15], [s * 7 / 90, -s * 21 / 90]]
        text = [[-s * 2 / 15, s * 7 / 90], [s * 2 / 15, -s * 7 / 90]]
        for row, expected in zip(gradients["image_features"], image, strict=True):
            assert row == pytest.approx(expected, rel=EXACT)
        for row, expected in zip(gradients["text_features"], text, strict=True):
            assert row == pytest.approx(expected, rel=EXACT)
        assert gradients["logit_scale"] == pytest.approx(-11 / 30, rel=EXACT)

    def test_smoothing_adds_the_mean_positive_less_the_mean_logit(self, target: Target) -> None:
        # mean positive ln 2 (2 + 3) / 2, mean logit ln 2 (2 + 1 + 0 + 3) / 4: ln 2 apart.
        plain, _ = self.result(target)
        smooth, _ = self.result(target, label_smoothing=0.1)
        assert smooth - plain == pytest.approx(0.1 * math.log(2), rel=EXACT)

    def test_constant_keys(self, target: Target) -> None:
        # Images from rows alone, (P_rows - I) / 4 = [[-1/12, 1/12], [1/36, -1/36]]; texts from
        # columns alone, (P_columns - I) / 4 = [[-1/20, 1/20], [1/20, -1/20]]; the scale from both.
        loss, gradients = self.result(target, differentiate_keys=False)
        assert loss == self.result(target)[0]
        s = self.SCALE
        image = [[-s / 12, s / 4], [s / 36, -s / 12]]
        text = [[-s / 20, s / 20], [s / 20, -s / 20]]
        for row, expected in zip(gradients["image_features"], image, strict=True):
            assert row == pytest.approx(expected, rel=EXACT)
        for row, expected in zip(gradients["text_features"], text, strict=True):
            assert row == pytest.approx(expected, rel=EXACT)
        assert gradients["logit_scale"] == pytest.approx(-11 / 30, rel=EXACT)


class TestValues:
    @pytest.mark.parametrize("target", targets("info_nce"))
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1], ids="smoothing={}".format)
    def test_confident_positives_keep_their_digits(
        self, target: Target, label_smoothing: float, generator: torch.Generator
    ) -> None:
        # The difference of two logits near 100 has an error of 2 * 100 eps = 2e-5. A float32
        # probability, and its loss and gradient, may have this error whatever their size.
        rounding = 2 * 100 * torch.finfo(torch.float32).eps
        error, eager_error = self.errors(target, 0.999, label_smoothing, generator)
        for name in error:
            assert error[name] <= 2 * rounding, f"{name}: {error[name]:.2e}"
            assert error[name] <= eager_error[name] + rounding, (
                f"{name}: {error[name]:.2e}, eager {eager_error[name]:.2e}"
            )

    @pytest.mark.parametrize("target", targets("info_nce"))
    def test_very_confident_positives_keep_what_cross_entropy_loses(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # log-sum-exp minus the logit, and probability minus 1, leave 3 digits of a loss of 1e-5.
        # Mean squares over ten batches: a single eager loss can be accurate by chance.
        runs = [self.errors(target, 0.99999, 0.0, generator) for _ in range(10)]
        for name in runs[0][0]:
            error, eager_error = (
                sum(run[index][name] ** 2 for run in runs) ** 0.5 for index in (0, 1)
            )
            assert error <= eager_error / 4, f"{name}: {error:.2e}, eager {eager_error:.2e}"

    def errors(
        self,
        target: Target,
        probability: float,
        label_smoothing: float,
        generator: torch.Generator,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the relative errors of loss and gradients in float32, the target's and eager."""
        image, text = confident_positives(
            128, 64, probability=probability, device=target.device, generator=generator
        )
        scale = torch.tensor(100.0, device=target.device)
        inputs = {"image_features": image, "text_features": text, "logit_scale": scale}
        options = {"label_smoothing": label_smoothing}
        (exact,), exact_gradients = losses_and_gradients(
            eager_losses, in_float64(inputs), **options
        )

        def errors_of(function: object) -> dict[str, float]:
            (loss,), gradients = losses_and_gradients(function, inputs, **options)
            errors = {
                name: relative_error(gradient, exact_gradients[name])
                for name, gradient in gradients.items()
            }
            return {"loss": relative_error(loss, exact), **errors}

        return errors_of(target), errors_of(eager_losses)

    @targets_by_dtype(*NAMES)
    @pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4, -100.0], ids="scale={:g}".format)
    def test_every_scale_is_finite_and_right(
        self, target: Target, scale: float, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator,
            24,
            16,
            scale=scale,
            dtype=dtype,
            device=target.device,
            generator=generator,
        )
        losses, gradients = losses_and_gradients(target, inputs, label_smoothing=0.1)
        exact = losses_and_gradients(eager_losses, in_float64(inputs), label_smoothing=0.1)
        for loss, truth in zip(losses, exact[0], strict=True):
            assert relative_error(loss, truth) <= 1e-5
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), name
            # |s| eps of float32 from the logits, plus the rounding to the inputs' dtype.
            tolerance = (1 + abs(scale)) * 1e-6 + torch.finfo(gradient.dtype).eps
            if name == "logit_scale":
                tolerance /= min(1.0, exact[1][name].abs().item())
            assert relative_error(gradient, exact[1][name]) <= tolerance, name

    @pytest.mark.parametrize("target", targets("info_nce", dtype=torch.float64))
    def test_scale_zero_gives_log_n(self, target: Target, generator: torch.Generator) -> None:
        inputs = make_inputs("info_nce", 7, 4, scale=0.0, device=target.device, generator=generator)
        (loss,), gradients = losses_and_gradients(target, inputs)
        assert loss.item() == pytest.approx(math.log(7), rel=1e-15)
        assert not gradients["image_features"].any()
        assert not gradients["text_features"].any()

    @targets_by_dtype("info_nce", dtypes=[torch.float32, torch.bfloat16])
    def test_identical_rows_give_log_n_and_no_gradient(
        self, target: Target, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        rows = equal_rows(32, 48, dtype=dtype, device=target.device, generator=generator)
        inputs = {
            "image_features": rows,
            "text_features": rows,
            "logit_scale": torch.tensor(100.0, device=target.device),
        }
        (loss,), gradients = losses_and_gradients(target, inputs)
        assert loss.item() == pytest.approx(math.log(32), rel=1e-6)
        for name, gradient in gradients.items():
            assert gradient.abs().max() <= 1e-5, name  # s / N = 3 is the size of each summand

    @pytest.mark.parametrize("target", targets("info_nce"))
    def test_duplicate_pairs_share_their_probability(
        self, target: Target, generator: torch.Generator
    ) -> None:
        # Two equal pairs far from the rest: both texts are equally likely, so each nll is log 2.
        image = power_law(16, 32, mean_offset=0.0, generator=generator).to(target.device)
        image[1] = image[0]
        _, row_nll, column_nll = target.kernel("fwd")(
            image, image, torch.tensor(1e4, device=target.device), 0.0, target.backend
        )
        for nll in (row_nll, column_nll):
            torch.testing.assert_close(nll[:2], torch.full_like(nll[:2], math.log(2)))
            assert not nll[2:].any()

    @pytest.mark.parametrize("target", targets(*NAMES))
    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1], ids="smoothing={}".format)
    def test_non_finite_in_gives_non_finite_out(
        self, target: Target, value: float, label_smoothing: float, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator, 5, 4, dtype=torch.float32, device=target.device, generator=generator
        )
        for name in inputs:
            spoiled = {key: tensor.clone() for key, tensor in inputs.items()}
            spoiled[name].view(-1)[-1] = value
            losses, gradients = losses_and_gradients(
                target, spoiled, label_smoothing=label_smoothing
            )
            for index, loss in enumerate(losses):
                if index in READ_BY.get(name, (0, 1)):
                    assert loss.isnan() if math.isnan(value) else not loss.isfinite(), name
                else:
                    assert loss.isfinite(), f"loss {index} does not read {name}"
            assert not all(gradient.isfinite().all() for gradient in gradients.values()), name

    @pytest.mark.parametrize("target", targets(*NAMES))
    def test_nan_in_a_single_pair_gives_nan_out(self, target: Target) -> None:
        # N = 1: there is no negative, and the loss would be 0 for any features.
        inputs = make_inputs(target.operator, 1, 4, dtype=torch.float32, device=target.device)
        inputs["image_features"][0, 0] = math.nan
        assert all(loss.isnan() for loss in target(**inputs))

    @pytest.mark.parametrize("target", targets(*NAMES))
    @pytest.mark.parametrize("value", [math.nan, -math.inf], ids=["nan", "-inf"])
    def test_check_finite_names_argument_and_index(
        self, target: Target, value: float, generator: torch.Generator
    ) -> None:
        inputs = make_inputs(
            target.operator,
            5,
            4,
            batch=(2,),
            dtype=torch.float32,
            device=target.device,
            generator=generator,
        )
        target(**inputs, check_finite=True)
        for name in inputs:
            spoiled = {key: tensor.clone() for key, tensor in inputs.items()}
            index, place = ((), "") if name == "logit_scale" else ((1, 2, 1), " at [1, 2, 1]")
            spoiled[name][index] = value
            with pytest.raises(ValueError) as error:
                target(**spoiled, check_finite=True)
            assert str(error.value) == (
                f"{target.operator}: expected {name} to be finite, got {value}{place}"
            )

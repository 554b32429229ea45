"""Rounding errors of the InfoNCE operators against eager PyTorch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import (
    NAMES,
    Target,
    assert_result_within_budget,
    eager_losses,
    in_float64,
    losses_and_gradients,
    make_inputs,
    targets,
    targets_by_dtype,
)

from himo_kernels.testing import confident_positives, relative_error


def integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


@targets_by_dtype(*NAMES)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.sample
def test_random_cases_within_the_budget(
    target: Target, dtype: torch.dtype, autocast: bool, generator: torch.Generator
) -> None:
    # 12 per combination of operator, dtype and autocast (18): 216 on one backend.
    for _ in range(12):
        samples, features = integer(1, 160, generator), integer(1, 160, generator)
        inputs = make_inputs(
            target.operator,
            samples,
            features,
            inner=integer(1, 24, generator),
            scale=[1.0, 14.3, 100.0][integer(0, 2, generator)],
            dtype=dtype,
            device=target.device,
            generator=generator,
        )
        assert_result_within_budget(
            target, inputs, autocast, label_smoothing=[0.0, 0.1][integer(0, 1, generator)]
        )


@targets_by_dtype(*NAMES)
@pytest.mark.parametrize("shape", [(252, 123), (128, 512), (64, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
@pytest.mark.sample
def test_shapes_within_the_budget(
    target: Target,
    dtype: torch.dtype,
    shape: tuple[int, int],
    differentiate_keys: bool,
    generator: torch.Generator,
) -> None:
    inputs = make_inputs(
        target.operator,
        *shape,
        inner=20,
        scale=100.0,
        dtype=dtype,
        device=target.device,
        generator=generator,
    )
    assert_result_within_budget(
        target, inputs, label_smoothing=0.1, differentiate_keys=differentiate_keys
    )


@targets_by_dtype(*NAMES)
def test_autocast_changes_nothing(
    target: Target, dtype: torch.dtype, generator: torch.Generator
) -> None:
    inputs = make_inputs(
        target.operator, 24, 40, dtype=dtype, device=target.device, generator=generator
    )
    losses, gradients = losses_and_gradients(target, inputs)
    for low_precision in (torch.bfloat16, torch.float16):
        with torch.autocast(target.device, dtype=low_precision):
            cast_losses, cast_gradients = losses_and_gradients(target, inputs)
        for loss, cast_loss in zip(losses, cast_losses, strict=True):
            assert cast_loss.dtype == torch.float32
            assert torch.equal(loss, cast_loss)
        for name, gradient in gradients.items():
            assert cast_gradients[name].dtype == inputs[name].dtype
            assert torch.equal(gradient, cast_gradients[name]), name


@pytest.mark.parametrize("target", targets(*NAMES, dtype=torch.bfloat16))
def test_logits_of_half_precision_features_are_float32(
    target: Target, generator: torch.Generator
) -> None:
    # bfloat16 keeps 8 bits of a logit near 100. The operator rounds to bfloat16 only the gradient
    # of the features, once: at most half a ulp.
    inputs = make_inputs(
        target.operator,
        96,
        64,
        inner=12,
        scale=100.0,
        dtype=torch.bfloat16,
        device=target.device,
        generator=generator,
    )
    losses, gradients = losses_and_gradients(target, inputs)
    exact, exact_gradients = losses_and_gradients(eager_losses, in_float64(inputs))
    for loss, truth in zip(losses, exact, strict=True):
        assert loss.dtype == torch.float32
        assert relative_error(loss, truth) <= 1e-5
    assert relative_error(gradients.pop("logit_scale"), exact_gradients["logit_scale"]) <= 1e-4
    half_unit = torch.finfo(torch.bfloat16).eps / 2
    for name, gradient in gradients.items():
        truth = exact_gradients[name]
        assert gradient.dtype == torch.bfloat16
        off_by = (gradient.double() - truth).abs()
        assert (off_by <= half_unit * truth.abs() + 1e-5 * truth.abs().max()).all(), name


@pytest.mark.parametrize("target", targets(*NAMES, dtype=torch.bfloat16))
def test_half_precision_losses_are_a_thousand_times_closer_than_eager(
    target: Target, generator: torch.Generator
) -> None:
    # Root mean squares over 20 batches: a single eager loss can be accurate by chance.
    squares = torch.zeros(2)
    for _ in range(20):
        inputs = make_inputs(
            target.operator,
            96,
            64,
            inner=12,
            scale=100.0,
            dtype=torch.bfloat16,
            device=target.device,
            generator=generator,
        )
        exact = torch.stack(eager_losses(**in_float64(inputs)))
        for index, losses in enumerate((target(**inputs), eager_losses(**inputs))):
            squares[index] += relative_error(torch.stack(losses), exact) ** 2
    error, eager_error = squares.sqrt().tolist()
    assert error <= eager_error / 1000, f"{error:.2e}, eager {eager_error:.2e}"


@targets_by_dtype("info_nce")
@pytest.mark.parametrize("scale", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("images", ["random", "near", "the codes"])
def test_exact_label_codes_within_the_budget(
    target: Target, dtype: torch.dtype, images: str, scale: float, generator: torch.Generator
) -> None:
    # Labels as captions: products with them are exact, so F.cross_entropy in float32 has almost no
    # error. Four rows share each code, and their parts of a gradient cancel.
    for codes in (torch.eye(16, 48), torch.randn(16, 48, generator=generator).sign() / 48**0.5):
        text = codes.repeat(4, 1)
        spread = {"random": float("inf"), "near": 0.1, "the codes": 0.0}[images]
        noise = torch.randn(text.shape, generator=generator)
        image = noise if spread == float("inf") else text + spread * noise
        inputs = {
            "image_features": F.normalize(image, dim=-1).to(target.device, dtype),
            "text_features": text.to(target.device, dtype),
            "logit_scale": torch.tensor(scale, device=target.device),
        }
        size = scale / len(text) ** 0.5  # of the terms s P_ij u_j / N of all rows
        least_norms = {"image_features": size, "text_features": size, "logit_scale": 1.0}
        assert_result_within_budget(target, inputs, least_norms=least_norms)


@targets_by_dtype("info_nce")
def test_confident_positives_within_the_budget(
    target: Target, dtype: torch.dtype, generator: torch.Generator
) -> None:
    image, text = confident_positives(
        96, 48, dtype=dtype, device=target.device, generator=generator
    )
    scale = torch.tensor(100.0, device=target.device)
    inputs = {"image_features": image, "text_features": text, "logit_scale": scale}
    assert_result_within_budget(target, inputs)

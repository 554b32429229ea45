"""Shared by the tests of the sigmoid loss: inputs, and the formula as SigLIP's paper states it."""

import torch
import torch.nn.functional as F
from info_nce_cases import Inputs, Losses, Target, in_float64, losses_and_gradients, make_inputs
from torch import Tensor

from himo_kernels.testing import assert_within_budget

NAME = "sigmoid_loss"


def sigmoid_inputs(
    samples: int,
    features: int,
    *,
    scale: float = 10.0,
    bias: float = -10.0,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> Inputs:
    """Features, scale and bias, the last two in the dtype of sums, by argument name."""
    inputs = make_inputs(NAME, samples, features, scale=scale, dtype=dtype, **options)
    return inputs | {"logit_bias": torch.full_like(inputs["logit_scale"], bias)}


def eager_loss(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
) -> Losses:
    """SigLIP's algorithm 1 in the dtype of the inputs, differentiated by autograd."""
    logits = logit_scale * (image_features @ text_features.mT) + logit_bias
    samples = logits.shape[-1]
    labels = 2 * torch.eye(samples, dtype=logits.dtype, device=logits.device) - 1
    return (-F.logsigmoid(labels * logits).sum((-2, -1)) / samples,)


def sizes_of_terms(inputs: Inputs) -> dict[str, float]:
    """The sums of the sizes of what the gradients of scale and bias add, which may cancel."""
    images, texts, scale, bias = in_float64(inputs).values()
    products = images @ texts.mT
    labels = 2 * torch.eye(len(products), dtype=products.dtype, device=products.device) - 1
    of_logits = torch.sigmoid(-labels * (scale * products + bias)) / len(products)
    return {
        "logit_scale": (of_logits * products.abs()).sum().item(),
        "logit_bias": of_logits.sum().item(),
    }


def assert_result_within_budget(target: Target, inputs: Inputs, autocast: bool = False) -> None:
    """Asserts loss and gradients within the error budget of eager PyTorch in the same dtype."""
    dtype = inputs["image_features"].dtype
    low_precision = torch.bfloat16 if dtype.itemsize > 2 else dtype
    with torch.autocast(target.device, dtype=low_precision, enabled=autocast):
        (actual,), gradients = losses_and_gradients(target, inputs)
        (eager,), eager_gradients = losses_and_gradients(eager_loss, inputs)
    (exact,), exact_gradients = losses_and_gradients(eager_loss, in_float64(inputs))
    least_norms = sizes_of_terms(inputs)
    # A logit has an error of up to eps times its size, and the loss and gradients have a quarter
    # of that, as the rounding errors of a row have mixed signs.
    condition = 1 + (inputs["logit_scale"].abs() + inputs["logit_bias"].abs()).item() / 4
    found = {"loss": (actual, eager, exact)} | {
        name: (gradients[name], eager_gradients[name], exact_gradients[name]) for name in inputs
    }
    for name, (got, plain, truth) in found.items():
        eps_ratio = torch.finfo(torch.float32).eps / torch.finfo(got.dtype).eps
        assert_within_budget(
            f"{target}: {name}",
            got,
            plain,
            truth,
            terms=max(inputs["image_features"].shape[-2:]),
            constant=condition * eps_ratio,
            least_norm=least_norms.get(name, 0.0),
        )

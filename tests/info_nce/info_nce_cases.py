"""Shared by the tests of the three InfoNCE operators: targets, inputs and the eager formula."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pytest
import torch
from backend_devices import devices_of
from torch import Tensor

import himo_kernels
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import OPERATORS
from himo_kernels.testing import assert_within_budget, oracle_info_nce, power_law

NAMES = ("info_nce", "dual_info_nce", "dual_info_nce_low_rank")
DUAL_NAMES = NAMES[1:]

# The differentiable inputs of each operator, in the order of its public arguments.
DIFFERENTIABLE = {
    "info_nce": ("image_features", "text_features", "logit_scale"),
    "dual_info_nce": ("image_features", "text_features", "component_features", "logit_scale"),
    "dual_info_nce_low_rank": (
        "image_features",
        "text_features",
        "coefficients",
        "basis",
        "logit_scale",
    ),
}

Inputs = dict[str, Tensor]
Losses = tuple[Tensor, ...]
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """An operator on one backend and device; a call returns a tuple of losses, also of one."""

    operator: str
    backend: str
    device: str

    def __call__(self, **arguments: object) -> Losses:
        losses = getattr(himo_kernels, self.operator)(backend=self.backend, **arguments)
        return losses if isinstance(losses, tuple) else (losses,)

    def kernel(self, direction: str) -> Callable[..., Losses]:
        """Returns the registered operator of one pass, which takes the backend as last argument."""
        return getattr(torch.ops.himo_kernels, f"{self.operator}_{direction}")


def targets(*operators: str, dtype: torch.dtype = torch.float32) -> list[object]:
    """Returns a pytest parameter for every backend in the operators' tables, on each device here.

    A backend that can take features of this dtype on none of them is a skip with its reason.
    """
    return [
        parameter
        for operator in operators
        for backend in OPERATORS[operator].backends
        for parameter in _targets_of_backend(operator, backend, dtype)
    ]


def targets_by_dtype(
    *operators: str, dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
) -> pytest.MarkDecorator:
    """Parametrises `target, dtype` over every backend and those of the dtypes that it takes."""
    parameters = [
        pytest.param(*target.values, dtype, marks=target.marks, id=f"{target.id}-{str(dtype)[6:]}")
        for dtype in dtypes
        for target in targets(*operators, dtype=dtype)
    ]
    return pytest.mark.parametrize("target, dtype", parameters)


def _targets_of_backend(operator: str, backend: str, dtype: torch.dtype) -> Iterable[object]:
    def parameter(device: str, reason: str | None) -> object:
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if reason is not None:
            marks.append(pytest.mark.skip(reason=f"{operator}, {backend}: {reason}"))
        target = Target(operator, backend, device)
        return pytest.param(target, marks=marks, id=f"{operator}-{backend}-{device}")

    def refusal(device: str) -> str | None:
        if device == "cuda" and not torch.cuda.is_available():
            return "needs a CUDA device"
        example = make_inputs(operator, 8, 16, dtype=dtype, device=device).values()
        return OPERATORS[operator].why_not(backend, *example)

    return [parameter(device, refusal(device)) for device in devices_of(backend)]


def make_inputs(
    operator: str,
    samples: int,
    features: int,
    *,
    batch: tuple[int, ...] = (),
    inner: int = 3,
    scale: float = 10.0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> Inputs:
    """Returns the operator's tensors by argument name; rows of features have length 1.

    Not those of one feature, which would be 1 or -1: they have any length.

    logit_scale is a tensor of the accumulation dtype, like a model's float32 parameter with
    half-precision features.
    """

    def rows(count: int, **options: float) -> Tensor:
        return power_law(
            count,
            features,
            batch=batch,
            dtype=dtype,
            device=device,
            generator=generator,
            normalize=features > 1,
            **options,
        )

    inputs = {"image_features": rows(samples), "text_features": rows(samples)}
    if operator == "dual_info_nce":
        inputs["component_features"] = rows(samples)
    if operator == "dual_info_nce_low_rank":
        coefficients = torch.randn(*batch, samples, inner, dtype=torch.float64, generator=generator)
        inputs["coefficients"] = (coefficients / inner**0.5).to(device, dtype)
        inputs["basis"] = rows(inner, mean_offset=0.0)
    inputs["logit_scale"] = torch.tensor(scale, dtype=accumulation_dtype(dtype), device=device)
    return inputs


def eager_losses(
    image_features: Tensor,  # [N, D], or [*, N, D]
    text_features: Tensor,
    logit_scale: Tensor | float,
    component_features: Tensor | None = None,
    coefficients: Tensor | None = None,
    basis: Tensor | None = None,
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
) -> Losses:
    """Returns the losses by F.cross_entropy in the dtype of the inputs, one problem at a time."""
    if coefficients is not None:
        component_features = coefficients @ basis
    texts = [text_features] if component_features is None else [text_features, component_features]

    def loss(text: Tensor) -> Tensor:
        problems = [
            oracle_info_nce(image, words, logit_scale, label_smoothing, differentiate_keys)
            for image, words in zip(_problems(image_features), _problems(text), strict=True)
        ]
        return torch.stack(problems).reshape(image_features.shape[:-2])

    return tuple(loss(text) for text in texts)


def _problems(features: Tensor) -> Iterable[Tensor]:
    return features.reshape(-1, *features.shape[-2:]).unbind(0)


def losses_and_gradients(
    function: Callable[..., Losses],
    inputs: Mapping[str, Tensor],
    weights: Losses | None = None,
    **options: object,
) -> tuple[Losses, Gradients]:
    """Returns the losses, and the gradients of their weighted sum in every input."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    losses = function(**leaves, **options)
    if weights is None:
        weights = tuple(torch.ones_like(loss) for loss in losses)
    gradients = torch.autograd.grad(losses, list(leaves.values()), weights)
    detached = tuple(loss.detach() for loss in losses)
    return detached, dict(zip(leaves, gradients, strict=True))


def in_float64(inputs: Mapping[str, Tensor]) -> Inputs:
    """Returns the same numbers as float64 tensors, for the oracle."""
    return {name: value.double() for name, value in inputs.items()}


def assert_equal_to(
    actual: tuple[Losses, Gradients], expected: tuple[Losses, Gradients], tolerance: float
) -> None:
    """Asserts that losses and gradients agree to this error, relative to the larger of 1 and norm.

    Not to a smaller norm: P_ii - 1 of a softmax is off by eps, however small the gradient is that
    follows from it.
    """
    (actual_losses, actual_gradients), (losses, gradients) = actual, expected
    for index, (got, loss) in enumerate(zip(actual_losses, losses, strict=True)):
        assert got.shape == loss.shape, f"loss {index}"
        torch.testing.assert_close(
            got.double(), loss.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"loss: {m}"
        )
    assert actual_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert actual_gradients[name].shape == gradient.shape, name
        error = (actual_gradients[name] - gradient).norm().item()
        error /= max(1.0, gradient.norm().item())
        assert error <= tolerance, f"gradient of {name}: error {error:.3e}"


def assert_result_within_budget(
    target: Target,
    inputs: Inputs,
    autocast: bool = False,
    least_norms: Mapping[str, float] | None = None,
    **options: object,
) -> None:
    """Asserts losses and gradients within the error budget of eager PyTorch in the same dtype.

    least_norms: the sizes of the terms of gradients, where they may cancel. No slack is left for
    logits below float32: the allowance added to the eager error is in float32's eps, also for
    16-bit inputs, whose gradients are rounded once at the end.
    """
    dtype = inputs["image_features"].dtype
    low_precision = torch.bfloat16 if dtype.itemsize > 2 else dtype
    with torch.autocast(target.device, dtype=low_precision, enabled=autocast):
        actual = losses_and_gradients(target, inputs, **options)
        eager = losses_and_gradients(eager_losses, inputs, **options)
    exact = losses_and_gradients(eager_losses, in_float64(inputs), **options)
    samples, features = inputs["image_features"].shape[-2:]
    terms = max(samples, features)  # of the longest sum
    if "basis" in inputs:
        terms = max(terms, inputs["basis"].shape[-2])
    # A logit of size |s| has an error of up to eps |s|, and so has a probability, relatively. A
    # quarter of it, as the rounding errors of a row have mixed signs.
    of_logits = 1 + inputs["logit_scale"].abs().item() / 4
    for name, got, plain, truth in _pairs(actual, eager, exact):
        condition = of_logits
        if name == "logit_scale" and truth:
            # A difference of two mean cosines: its error is relative to the cosines.
            condition *= max(1.0, 1 / truth.abs().item())
        eps_ratio = torch.finfo(torch.float32).eps / torch.finfo(got.dtype).eps
        assert_within_budget(
            f"{target}: {name}, N={samples}, D={features}",
            got,
            plain,
            truth,
            terms=terms,
            constant=condition * eps_ratio,
            least_norm=(least_norms or {}).get(name, 0.0),
        )


def _pairs(
    *results: tuple[Losses, Gradients],
) -> Iterable[tuple[str, Tensor, Tensor, Tensor]]:
    losses = zip(*(losses for losses, _ in results), strict=True)
    for index, values in enumerate(losses):
        yield f"loss {index}", *values
    for name in results[0][1]:
        yield name, *(gradients[name] for _, gradients in results)


def fingerprints(seed: int) -> dict[str, str]:
    """Returns a digest of losses and gradients of every operator and backend that runs on a CPU."""
    digests = {}
    for parameter in targets(*NAMES):
        (target,) = parameter.values
        if parameter.marks or target.device != "cpu":
            continue
        inputs = make_inputs(
            target.operator,
            100,
            67,
            scale=100.0,
            dtype=torch.float32,
            generator=torch.Generator().manual_seed(seed),
        )
        losses, gradients = losses_and_gradients(target, inputs, label_smoothing=0.1)
        digest = hashlib.sha256()
        for tensor in (*losses, *gradients.values()):
            digest.update(tensor.contiguous().numpy().tobytes())
        digests[parameter.id] = digest.hexdigest()
    return digests

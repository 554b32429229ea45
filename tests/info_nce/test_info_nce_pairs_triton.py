"""info_nce_pairs in Triton on small shapes, in Triton's interpreter if there is no GPU.

The interpreter's tile is 16 x 32, so 40 rows and 70 columns are ragged and take several tiles.
"""

import pytest
import torch
from fresh_process import run_python
from guarded_memory import between_nan, guarded_allocations
from pairs_cases import dense, features, loss_and_gradients
from test_info_nce_pairs import FORMS, drawn
from torch import Tensor

import himo_kernels
from himo_kernels import _triton
from himo_kernels.dispatch import OPERATORS
from himo_kernels.testing import assert_within_budget, confident_positives, relative_error

if _triton.MISSING:
    pytest.skip(_triton.MISSING, allow_module_level=True)

from himo_kernels.info_nce.triton import grad_logits, pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)

pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    # Masked lanes hold arbitrary values, about which NumPy warns and a GPU does not.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.skipif(
        DEVICE == "cpu" and not _triton.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
]
DIRECTIONS = pytest.mark.parametrize("directions", ["both", "rows", "columns"])


def on_device(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def run(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of the Triton backend, on the CPU."""
    options = {name: on_device(value) for name, value in options.items()}
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    loss, gradients = loss_and_gradients(himo_kernels.info_nce, inputs, backend="triton", **options)
    return loss.cpu(), {name: gradient.cpu() for name, gradient in gradients.items()}


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in inputs.items()}


def assert_close_to_dense(
    inputs: dict[str, Tensor], tolerance: float = 1e-5, **options: object
) -> None:
    """Asserts loss and gradients equal to those of the dense formula in float64."""
    loss, gradients = run(inputs, **options)
    expected, exact = loss_and_gradients(dense, wide(inputs), **options)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for name, gradient in exact.items():
        error = (gradients[name] - gradient).norm().item() / max(1.0, gradient.norm().item())
        assert error <= tolerance, f"gradient of {name}: error {error:.3e}"


@DIRECTIONS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(40, 70), (70, 20), (1, 4), (5, 1)], ids=str)
@pytest.mark.sample
def test_loss_and_gradients(form, directions, shape, generator):
    options = drawn(*shape, generator)[form]
    if shape[0] != shape[1] and options.get("weights") is None:
        options = {**options, "reduction": "sum"}
    inputs = features(*shape, dtype=torch.float32, generator=generator)
    assert_close_to_dense(inputs, directions=directions, label_smoothing=0.1, **options)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("form", ["positives", "labels", "exclusions"])
@pytest.mark.parametrize("rounds", [False, True], ids=["float32", "rounded"])
@pytest.mark.sample(4)
def test_within_the_budget(form, dtype, rounds, generator, monkeypatch):
    # From 128 samples on, dL/dS has the features' dtype.
    monkeypatch.setattr(grad_logits, "ROUNDED_FROM", 1 if rounds else 128)
    inputs = features(40, 70, 20, dtype=dtype, generator=generator)
    options = {"label_smoothing": 0.1, **drawn(40, 70, generator)[form]}
    loss, gradients = run(inputs, **options)
    plain, eager = loss_and_gradients(dense, inputs, **options)
    truth, exact = loss_and_gradients(dense, wide(inputs), **options)
    found = {"loss": (loss, plain, truth)}
    found |= {name: (gradients[name], eager[name], exact[name]) for name in gradients}
    for name, (actual, in_dtype, of_float64) in found.items():
        # A logit of size s has an error of up to s eps of float32.
        ratio = torch.finfo(torch.float32).eps / torch.finfo(actual.dtype).eps
        condition = (1 + inputs["logit_scale"].item() / 4) * ratio
        if name == "logit_scale":  # a difference of mean cosines, with the error of cosines
            condition *= max(1.0, 1 / of_float64.abs().item())
        assert_within_budget(
            f"{form}: {name}", actual, in_dtype, of_float64, terms=70, constant=condition
        )


def test_a_confident_positive_keeps_its_digits(generator):
    image, text = confident_positives(40, 32, probability=0.99999, generator=generator)
    inputs = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(100.0)}
    options = {"positives": torch.arange(40), "directions": "rows"}
    loss, gradients = run(inputs, **options)
    truth, exact = loss_and_gradients(dense, wide(inputs), **options)
    rounding = 4 * 100 * torch.finfo(torch.float32).eps
    assert relative_error(loss, truth) <= rounding
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact[name]) <= rounding, name


def test_leading_dimensions_are_independent_problems(generator):
    inputs = features(19, 37, batch=(2, 2), dtype=torch.float32, generator=generator)
    positives = torch.randint(37, (2, 2, 19), generator=generator)
    labels = (
        torch.randint(3, (19,), generator=generator),
        torch.randint(3, (2, 2, 37), generator=generator),
    )
    options = {"positives": positives, "labels": labels, "same_label": "exclude"}
    options |= {"directions": "both", "exclude_self": True}
    loss, gradients = run(inputs, **options)
    expected, exact = loss_and_gradients(
        himo_kernels.info_nce, wide(inputs), backend="reference", **options
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for name, gradient in exact.items():
        assert relative_error(gradients[name], gradient) <= 1e-5, name


@pytest.mark.slow
def test_more_launches_and_splits_give_the_same(generator, monkeypatch):
    inputs = features(40, 70, dtype=torch.float32, generator=generator)
    options = drawn(40, 70, generator)["exclusions, not itself, weights"]
    loss, gradients = run(inputs, **options)
    monkeypatch.setattr(pairs, "PROGRAMS", 1)  # one program for all columns
    monkeypatch.setattr(grad_logits, "WORKSPACE_BYTES", 0)  # one block of rows at a time
    again, gradients_again = run(inputs, **options)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert relative_error(gradients_again[name], gradient) <= 1e-6, name


def test_nothing_is_touched_outside_of_an_allocation(generator):
    inputs = features(40, 70, dtype=torch.float32, generator=generator)
    options = drawn(40, 70, generator)["exclusions"]
    loss, gradients = run(inputs, **options)
    between = {name: between_nan(value.to(DEVICE)) for name, value in inputs.items()}
    with guarded_allocations(least=6):
        again, gradients_again = run(between, **options)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name


def test_runs_are_bitwise_equal(generator):
    inputs = features(40, 70, dtype=torch.bfloat16, generator=generator)
    options = drawn(40, 70, generator)["labels"]
    loss, gradients = run(inputs, **options)
    again, gradients_again = run(inputs, **options)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name


def test_only_what_is_needed_is_returned(generator):
    inputs = features(20, 35, dtype=torch.float32, generator=generator)
    positives = torch.randint(35, (20,), generator=generator).to(DEVICE)
    for wanted in inputs:
        leaves = {
            name: value.to(DEVICE, copy=True).requires_grad_(name == wanted)
            for name, value in inputs.items()
        }
        himo_kernels.info_nce(**leaves, positives=positives, backend="triton").backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


def test_nan_in_gives_nan_out(generator):
    inputs = features(20, 35, dtype=torch.float32, generator=generator)
    inputs["text_features"][3, 1] = torch.nan
    loss, gradients = run(inputs, **drawn(20, 35, generator)["labels"])
    assert loss.isnan() and gradients["logit_scale"].isnan()


def test_nt_xent(generator):
    x, y = (
        features(20, 1, dtype=torch.float32, generator=generator)["image_features"] for _ in "xy"
    )
    loss = himo_kernels.nt_xent(x.to(DEVICE), y.to(DEVICE), 5.0, backend="triton")
    expected = himo_kernels.nt_xent(x.double(), y.double(), 5.0, backend="reference")
    assert relative_error(loss.cpu(), expected) <= 1e-6


def test_float64_is_refused():
    x = torch.eye(3, dtype=torch.float64, device=DEVICE)
    reason = OPERATORS["info_nce_pairs"].why_not("triton", x)
    assert reason == "needs float16, bfloat16 or float32, got float64"


@pytest.mark.slow
def test_launches_are_recorded_for_the_compiler():
    # In a fresh process: kernels defined for the interpreter cannot be compiled.
    script = (
        "from himo_kernels import aot\n"
        "for target in aot.TARGETS:\n"
        "    for case in aot.cases(['info_nce_pairs']):\n"
        "        print(case.label, {x.kernel.__name__ for x in aot.launches(case, target)})"
    )
    lines = run_python("-c", script, TRITON_INTERPRET="0").splitlines()
    assert len(lines) == 24  # three dtypes, two sizes, two forms, two architectures
    for line in lines:
        assert "'pairs_statistics_kernel'" in line and "'pairs_gradient_kernel'" in line

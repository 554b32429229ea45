"""The Triton kernel of the sigmoid loss, in Triton's interpreter if there is no GPU.

The interpreter's tile is 16 x 32, so 40 rows are ragged and take several blocks of rows and tiles.
"""

import pytest
import torch
from fresh_process import run_python
from guarded_memory import between_nan, guarded_allocations
from info_nce_cases import Target, in_float64, losses_and_gradients
from sigmoid_cases import NAME, assert_result_within_budget, eager_loss, sigmoid_inputs

from himo_kernels import _triton, sigmoid_loss
from himo_kernels.sigmoid_loss.op import BLOCK
from himo_kernels.testing import relative_error

if _triton.MISSING:
    pytest.skip(_triton.MISSING, allow_module_level=True)

from himo_kernels.info_nce.triton import grad_logits

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
TARGET = Target(NAME, "triton", DEVICE)
per_dtype = pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)


@per_dtype
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (100.0, -100.0), (5.0, 7.0)])
@pytest.mark.sample
def test_within_the_budget(dtype, scale, bias, generator):
    for shape in ((40, 35), (32, 64), (17, 5), (1, 16)):
        inputs = sigmoid_inputs(
            *shape, scale=scale, bias=bias, dtype=dtype, device=DEVICE, generator=generator
        )
        assert_result_within_budget(TARGET, inputs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounded_gradients_of_the_logits(dtype, generator, monkeypatch):
    # From 128 samples on, dL/dl has the features' dtype, also at SigLIP's first bias of -10, where
    # most of it is below float16's normal range.
    monkeypatch.setattr(grad_logits, "ROUNDED_FROM", 1)
    inputs = sigmoid_inputs(40, 35, dtype=dtype, device=DEVICE, generator=generator)
    assert_result_within_budget(TARGET, inputs)
    _, gradients = losses_and_gradients(TARGET, inputs)
    _, exact = losses_and_gradients(eager_loss, in_float64(inputs))
    for name in ("image_features", "text_features"):
        assert relative_error(gradients[name], exact[name]) <= torch.finfo(dtype).eps / 2, name


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_biases(value, generator):
    inputs = sigmoid_inputs(
        20, 6, bias=value, dtype=torch.float32, device=DEVICE, generator=generator
    )
    (loss,), gradients = losses_and_gradients(TARGET, inputs)
    (exact,), exact_gradients = losses_and_gradients(eager_loss, in_float64(inputs))
    assert relative_error(loss, exact) <= 1e-6
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact_gradients[name]) <= 1e-5, name


def test_leading_dimensions(generator):
    inputs = sigmoid_inputs(
        19, 6, batch=(2, 2), dtype=torch.float32, device=DEVICE, generator=generator
    )
    weights = (torch.randn(2, 2, generator=generator).to(DEVICE),)
    (loss,), gradients = losses_and_gradients(TARGET, inputs, weights)
    (exact,), exact_gradients = losses_and_gradients(
        eager_loss, in_float64(inputs), (weights[0].double(),)
    )
    assert relative_error(loss, exact) <= 1e-6
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact_gradients[name]) <= 1e-5, name


def test_no_problem_at_all():
    inputs = sigmoid_inputs(5, 4, batch=(0,), dtype=torch.float32, device=DEVICE)
    (loss,), gradients = losses_and_gradients(TARGET, inputs)
    assert loss.shape == (0,)
    assert not any(gradient.any() for gradient in gradients.values())


def test_more_launches_give_the_same(generator, monkeypatch):
    inputs = sigmoid_inputs(
        40, 10, batch=(2,), dtype=torch.float32, device=DEVICE, generator=generator
    )
    (loss,), gradients = losses_and_gradients(TARGET, inputs)
    monkeypatch.setattr(grad_logits, "WORKSPACE_BYTES", 0)  # one block of rows at a time
    (again,), gradients_again = losses_and_gradients(TARGET, inputs)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert relative_error(gradients_again[name], gradient) <= 1e-6, name


def test_only_what_is_needed_is_computed(generator):
    inputs = sigmoid_inputs(20, 10, dtype=torch.float32, device=DEVICE, generator=generator)
    kernel = TARGET.kernel("fwd")
    full = kernel(*inputs.values(), [True] * 4, "triton")
    for index in range(4):
        needs_grad = [position == index for position in range(4)]
        loss, *grads = kernel(*inputs.values(), needs_grad, "triton")
        assert torch.equal(loss, full[0])
        for position, grad in enumerate(grads):
            wanted = full[1 + position] if position == index else torch.empty(0)
            assert torch.equal(grad, wanted.to(grad))


def test_blocks_are_those_of_the_reference(generator):
    inputs = sigmoid_inputs(70, 10, dtype=torch.float32, device=DEVICE, generator=generator)
    images, texts, *scalars = inputs.values()
    # Pairs on the diagonal, at one corner, next to the corner, and in no row.
    for rows, columns in (
        ((0, 20), (0, 20)),
        ((31, 47), (0, 32)),
        ((32, 48), (0, 32)),
        ((3, 9),) * 2,
    ):
        block = (images[slice(*rows)], texts[slice(*columns)], *scalars, rows[0] - columns[0])
        expected = BLOCK.run("fwd", *block, [True] * 4, "reference")
        for value, other in zip(
            BLOCK.run("fwd", *block, [True] * 4, "triton"), expected, strict=True
        ):
            assert value.shape == other.shape
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


def test_nothing_is_touched_outside_of_an_allocation(generator):
    inputs = sigmoid_inputs(40, 35, dtype=torch.float32, device=DEVICE, generator=generator)
    (loss,), gradients = losses_and_gradients(TARGET, inputs)
    between = {name: between_nan(value) for name, value in inputs.items()}
    with guarded_allocations(least=5):
        (again,), gradients_again = losses_and_gradients(TARGET, between)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name


@per_dtype
def test_runs_are_bitwise_equal(dtype, generator):
    inputs = sigmoid_inputs(40, 20, dtype=dtype, device=DEVICE, generator=generator)
    (loss,), gradients = losses_and_gradients(TARGET, inputs)
    (again,), gradients_again = losses_and_gradients(TARGET, inputs)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name


def test_opcheck(generator):
    inputs = sigmoid_inputs(
        6, 4, batch=(2,), dtype=torch.float32, device=DEVICE, generator=generator
    )
    for needs_grad in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(
            TARGET.kernel("fwd").default, (*inputs.values(), needs_grad, "triton")
        )


def test_the_loss_may_be_changed_in_place(generator):
    inputs = sigmoid_inputs(9, 4, dtype=torch.float32, device=DEVICE, generator=generator)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    (loss,) = TARGET(**leaves)
    loss *= 2
    loss.backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


def test_float64_is_refused():
    x = torch.eye(3, dtype=torch.float64, device=DEVICE)
    reason = "triton: needs float16, bfloat16 or float32, got float64"
    with pytest.raises(NotImplementedError, match=reason):
        sigmoid_loss(x, x, 1.0, 0.0, backend="triton")


@pytest.mark.slow
def test_launches_are_recorded_for_the_compiler():
    # In a fresh process: kernels defined for the interpreter cannot be compiled.
    script = (
        "from himo_kernels import aot\n"
        "for target in aot.TARGETS:\n"
        "    for case in aot.cases(['sigmoid_loss']):\n"
        "        kernels = [launch.kernel.__name__ for launch in aot.launches(case, target)]\n"
        "        print(case.label, kernels)"
    )
    lines = run_python("-c", script, TRITON_INTERPRET="0").splitlines()
    assert len(lines) == 24  # three dtypes, two sizes, whole and block, two architectures
    assert all("'sigmoid_kernel', 'sigmoid_kernel'" in line for line in lines)

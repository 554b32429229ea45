"""Plain calls, which one C++ function answers: the same bits as the general way, or that way."""

import signal
from typing import Any

import pytest
import torch
from info_nce_cases import make_inputs
from plain_calls import (
    BACKWARD_OBSERVERS,
    LAYOUTS,
    LEAF_LAYOUTS,
    OBSERVERS,
    SCALES,
    SURROUNDINGS,
    assert_same_bits,
    detached,
    gradients,
    record_answers,
    set_plain,
    weights_of,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

import himo_kernels
from himo_kernels import dispatch, extension
from himo_kernels.info_nce import cpu
from himo_kernels.info_nce.op import DUAL_INFO_NCE, INFO_NCE

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=extension.why_not() or "")

NAMES = ("info_nce", "dual_info_nce")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def answered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the function answered, for each call that reached it."""
    return record_answers(monkeypatch, INFO_NCE, DUAL_INFO_NCE)


def _losses(name: str, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    losses = getattr(himo_kernels, name)(*inputs, **options)
    return losses if isinstance(losses, tuple) else (losses,)


def _in_general(name: str, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        set_plain(patch, (INFO_NCE, DUAL_INFO_NCE), lambda plain: None)
        return _losses(name, *inputs, **options)


CASES = [
    pytest.param(name, dtype, shape, smoothing, id=f"{name}-{dtype}-{shape}-{smoothing}")
    for name in NAMES
    for dtype in DTYPES
    for shape in [(128, 48), (1, 1), (300, 7), (2, 3, 5, 4)]
    for smoothing in [0.0, 0.1]
]


def _case(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    smoothing: float,
    generator: torch.Generator,
) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Returns the features, the scale and the options of a call."""
    *batch, samples, features = shape
    kind = {"batch": tuple(batch), "dtype": dtype, "generator": generator}
    *inputs, scale = make_inputs(name, samples, features, **kind).values()
    return inputs, scale, {"label_smoothing": smoothing, "differentiate_keys": smoothing == 0}


@pytest.mark.parametrize(("name", "dtype", "shape", "smoothing"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(40)
def test_the_same_bits(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    smoothing: float,
    layout: str,
    answered: list[bool],
    generator: torch.Generator,
) -> None:
    inputs, scale, options = _case(name, dtype, shape, smoothing, generator)
    inputs = [LAYOUTS[layout](x) for x in inputs]
    losses = _losses(name, *inputs, scale, **options)
    assert answered == [layout != "negative view"]
    assert_same_bits(losses, _in_general(name, *inputs, scale, **options))


def test_no_problem_at_all(answered: list[bool]) -> None:
    x = torch.ones(0, 3, 2)
    assert [loss.shape for loss in _losses("dual_info_nce", x, x, x, 1.0)] == [(0,), (0,)]
    assert answered == [True]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_kind_of_scale(
    scale: str, dtype: torch.dtype, answered: list[bool], generator: torch.Generator
) -> None:
    value, plain = SCALES[scale]
    image, text, _ = make_inputs("info_nce", 9, 5, dtype=dtype, generator=generator).values()
    losses = _losses("info_nce", image, text, value)
    assert answered == [plain]
    assert_same_bits(losses, _in_general("info_nce", image, text, value))


def test_a_scale_that_float32_does_not_hold_raises_what_it_did(answered: list[bool]) -> None:
    x = torch.eye(3)
    with pytest.raises(ValueError) as general:
        _in_general("info_nce", x, x, 1e300)
    with pytest.raises(ValueError) as caught:
        himo_kernels.info_nce(x, x, 1e300)
    assert str(caught.value) == str(general.value)
    assert answered == [False]


OPTIONS: dict[str, dict[str, Any]] = {
    "another reduction": {"reduction": "sum"},
    "a direction": {"directions": "rows"},
    "positives": {"positives": torch.arange(6)},
    "labels": {"labels": torch.arange(6)},
    "weights": {"weights": torch.ones(6)},
    "checked values": {"check_finite": True},
    "a budget": {"keep_logits_mib": 1.0},
    "the reference": {"backend": "reference"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_another_form_goes_the_general_way(options: str, answered: list[bool]) -> None:
    x = torch.eye(6)
    loss = himo_kernels.info_nce(x, x, 2.0, **OPTIONS[options])
    assert answered == []
    expected = himo_kernels.info_nce(x, x, 2.0).item()
    assert loss.item() == pytest.approx(expected * (6 if "reduction" in OPTIONS[options] else 1))


def test_a_backend_by_name_and_by_the_variable(
    answered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.eye(6)
    himo_kernels.info_nce(x, x, 2.0, backend="cpu")
    monkeypatch.setattr(dispatch, "_default_backend", "cpu")
    himo_kernels.info_nce(x, x, 2.0)
    assert answered == [True, True]
    monkeypatch.setattr(dispatch, "_default_backend", "reference")
    himo_kernels.info_nce(x, x, 2.0)
    assert answered == [True, True]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_an_observed_call_goes_the_general_way(observer: str, answered: list[bool]) -> None:
    x = torch.eye(6)
    expected = himo_kernels.info_nce(x, x, 2.0)
    with OBSERVERS[observer]():
        loss = himo_kernels.info_nce(x, x, 2.0)
    assert answered in ([True], [True, False])  # the first call alone
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(("name", "dtype", "shape", "smoothing"), CASES)
@pytest.mark.parametrize("layout", LEAF_LAYOUTS)
@pytest.mark.sample(40)
def test_the_same_bits_of_gradients(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    smoothing: float,
    layout: str,
    answered: list[bool],
    generator: torch.Generator,
) -> None:
    features, scale, options = _case(name, dtype, shape, smoothing, generator)
    features.append(scale.expand(1, 1))
    inputs = [LAYOUTS[layout](x).detach().requires_grad_() for x in features]
    losses = _losses(name, *inputs, **options)
    expected = _in_general(name, *inputs, **options)
    assert answered == [True]
    for loss in losses:  # the name that anomaly mode prints
        assert loss.grad_fn.name() == "torch::autograd::CppNode<himo::ContrastiveLoss>"
    assert_same_bits(detached(losses), detached(expected))
    assert_same_bits(gradients(losses, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_only_the_gradients_that_are_needed(
    which: int, answered: list[bool], generator: torch.Generator
) -> None:
    shape = {"dtype": torch.float32, "generator": generator}
    inputs = list(make_inputs("dual_info_nce", 9, 5, **shape).values())
    inputs[which].requires_grad_()
    expected = gradients(_in_general("dual_info_nce", *inputs), [inputs[which]])
    assert_same_bits(gradients(_losses("dual_info_nce", *inputs), [inputs[which]]), expected)
    with torch.no_grad():
        assert not himo_kernels.dual_info_nce(*inputs)[0].requires_grad
    assert answered == [True, True]


def test_one_loss_of_two(answered: list[bool], generator: torch.Generator) -> None:
    shape = {"dtype": torch.float32, "generator": generator}
    inputs = [x.requires_grad_() for x in make_inputs("dual_info_nce", 9, 5, **shape).values()]
    options = {"retain_graph": True}
    losses = _losses("dual_info_nce", *inputs)
    expected = torch.autograd.grad(_in_general("dual_info_nce", *inputs)[1], inputs)
    for _ in range(2):  # the cached logits are read, not changed
        assert_same_bits(torch.autograd.grad(losses[1], inputs, **options), expected)
    assert answered == [True]


def test_logits_that_are_not_small_go_the_general_way(
    answered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.eye(6, requires_grad=True)
    monkeypatch.setattr(cpu, "SMALL", 2 * 36 * 4)
    himo_kernels.dual_info_nce(x, x, x, 2.0)
    monkeypatch.setattr(cpu, "SMALL", 2 * 36 * 4 - 1)
    himo_kernels.dual_info_nce(x, x, x, 2.0)
    assert answered == [True, False]
    assert not himo_kernels.dual_info_nce(x.detach(), x.detach(), x.detach(), 2.0)[0].requires_grad
    assert answered == [True, False, True]  # without a gradient nothing is cached


def test_a_second_order_gradient_raises_what_it_did(answered: list[bool]) -> None:
    x = torch.eye(6, requires_grad=True)
    messages = []
    for losses in (
        _losses("dual_info_nce", x, x, x, 2.0),
        _in_general("dual_info_nce", x, x, x, 2.0),
    ):
        with pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(losses[0], x, create_graph=True)
        messages.append(str(caught.value))
    assert answered == [True]
    assert messages[0] == messages[1]


def test_features_changed_before_the_backward_are_an_error(answered: list[bool]) -> None:
    x, y = torch.eye(6, requires_grad=True), torch.eye(6)
    loss = himo_kernels.info_nce(x, y, 2.0)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert answered == [True]


def test_saved_tensors_pass_the_hooks(answered: list[bool], generator: torch.Generator) -> None:
    shape = {"dtype": torch.float32, "generator": generator}
    inputs = [x.requires_grad_() for x in make_inputs("info_nce", 9, 5, **shape).values()]
    expected = gradients(_in_general("info_nce", *inputs), inputs)
    packed: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x.shape)
        return x.double()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.float()):
        losses = _losses("info_nce", *inputs)
    assert packed == [(9, 5), (9, 5), (), (9,), (9,), (1, 9, 9)]
    assert_same_bits(gradients(losses, inputs), expected)

    def run(*inputs: Tensor) -> Tensor:
        return himo_kernels.info_nce(*inputs)

    losses = (torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False),)
    assert_same_bits(gradients(losses, inputs), expected)
    assert answered == [True, True]  # the recomputation ends with an exception of a hook


def test_what_a_hook_raises_reaches_the_caller(answered: list[bool]) -> None:
    def pack(x: Tensor) -> Tensor:
        raise LookupError("no room")

    x = torch.eye(6, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with pytest.raises(LookupError, match="no room"), hooks:
        himo_kernels.info_nce(x, x, 2.0)
    assert answered == []


@pytest.mark.parametrize("observer", BACKWARD_OBSERVERS)
def test_an_observed_backward_calls_the_operator(
    observer: str, answered: list[bool], generator: torch.Generator
) -> None:
    shape = {"dtype": torch.float32, "generator": generator}
    inputs = [x.requires_grad_() for x in make_inputs("dual_info_nce", 9, 5, **shape).values()]
    expected = gradients(_in_general("dual_info_nce", *inputs), inputs)
    losses = _losses("dual_info_nce", *inputs)
    weights = weights_of(losses)
    with OBSERVERS[observer]() as seen:
        of_inputs = torch.autograd.grad(losses, inputs, weights)
    assert answered == [True]
    assert_same_bits(of_inputs, expected)
    if observer == "the profiler":
        assert "himo_kernels::dual_info_nce_bwd" in {event.name for event in seen.events()}


def test_a_batch_of_incoming_gradients(answered: list[bool], generator: torch.Generator) -> None:
    shape = {"dtype": torch.float64, "generator": generator}
    inputs = [x.requires_grad_() for x in make_inputs("info_nce", 9, 5, **shape).values()]
    (loss,) = _losses("info_nce", *inputs)
    batch = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    of_inputs = torch.autograd.grad(loss, inputs, batch, is_grads_batched=True, retain_graph=True)
    for weight, *of_weight in zip(batch, *of_inputs, strict=True):
        expected = torch.autograd.grad(loss, inputs, weight, retain_graph=True)
        assert_same_bits(tuple(of_weight), expected)
    assert answered == [True]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_precision_allowed_before_the_backward_changes_no_bit(
    precision: str, answered: list[bool], generator: torch.Generator
) -> None:
    shape = {"dtype": torch.float32, "generator": generator}
    inputs = [x.requires_grad_() for x in make_inputs("info_nce", 40, 30, **shape).values()]
    expected = gradients(_in_general("info_nce", *inputs), inputs)
    losses = _losses("info_nce", *inputs)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        of_inputs = gradients(losses, inputs)
        assert matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = before
    assert_same_bits(of_inputs, expected)
    assert answered == [True]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
def test_a_signal_interrupts_a_backward(answered: list[bool]) -> None:
    class Late(Exception):
        pass

    def ring(*_: Any) -> None:
        raise Late

    x = torch.randn(1400, 8192).requires_grad_()
    loss = himo_kernels.info_nce(x, x, 1.0)
    assert answered == [True]
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Late):
            loss.backward()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert x.grad is None


def test_a_fake_tensor_goes_the_general_way(answered: list[bool]) -> None:
    with FakeTensorMode():
        x = torch.ones(6, 4)
        loss = himo_kernels.info_nce(x, x, 2.0)
    assert not any(answered)
    assert type(loss) is type(x)


def test_a_compiled_call_holds_the_operator(answered: list[bool]) -> None:
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(module.graph))
        return module

    x = torch.eye(6)
    compiled = torch.compile(himo_kernels.dual_info_nce, backend=keep, fullgraph=True)
    losses = compiled(x, x, x, 2.0)
    assert answered == []
    assert len(graphs) == 1 and "dual_info_nce_fwd" in graphs[0]
    assert_same_bits(losses, himo_kernels.dual_info_nce(x, x, x, 2.0))


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_surroundings_change_no_bit(
    surroundings: str, answered: list[bool], generator: torch.Generator
) -> None:
    inputs = make_inputs("info_nce", 40, 30, dtype=torch.float32, generator=generator).values()
    expected = _in_general("info_nce", *inputs, label_smoothing=0.1)
    with SURROUNDINGS[surroundings]():
        losses = _losses("info_nce", *inputs, label_smoothing=0.1)
    assert answered == [surroundings != "autocast"]
    assert losses[0].is_inference() == (surroundings == "inference_mode")
    assert_same_bits(losses, expected)


def test_an_argument_that_raises_at_every_attribute_is_named():
    class Raises:
        @property
        def requires_grad(self) -> bool:
            raise RuntimeError("no attribute of this may be read")

    with pytest.raises(TypeError, match="expected image_features to be a torch.Tensor"):
        himo_kernels.info_nce(Raises(), torch.ones(2, 2), 1.0)

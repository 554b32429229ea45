"""Plain calls of himo_loss and HiMoLoss, which one C++ function answers: the same bits."""

import contextlib
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
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

from himo_kernels import dispatch, extension
from himo_kernels import testing as hkt
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.himo_loss import cpu, himo_loss
from himo_kernels.himo_loss.op import HIMO_LOSS
from himo_kernels.info_nce import api
from himo_kernels.nn import PRESETS, HiMoLoss

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=extension.why_not() or "")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(128, 48), (40, 96), (1, 1), (16, 7), (2, 3, 5, 4), (2, 4, 9)]
# The last keeps all components of most batches; few keeps one of most.
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "official": {
        "variance_threshold": 0.85,
        "variance_floor": 1e-8,
        "normalize_components": False,
        "label_smoothing": 0.1,
        "differentiate_keys": False,
    },
    "few": {"variance_threshold": 0.3, "differentiate_basis": False},
    "all": {"variance_threshold": 1.0, "gap_eps": 0.0},
}
Call = Callable[..., tuple[Tensor, ...]]  # of images, texts and scale: both losses and the rank


def _module(settings: dict[str, Any], normalize: bool = True) -> Call:
    names = {"differentiate_keys": "gather_with_grad"}
    given = {names.get(name, name): value for name, value in settings.items()}
    return HiMoLoss(normalize_features=normalize, **given).terms


def _operator(settings: dict[str, Any]) -> Call:
    return lambda *inputs, **options: himo_loss(*inputs, **settings, **options)


CALLS: dict[str, Callable[[dict[str, Any]], Call]] = {
    "himo_loss": _operator,
    "HiMoLoss": _module,
    "HiMoLoss as given": lambda settings: _module(settings, normalize=False),
}
each_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def answered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the function answered, for each call that reached it."""
    return record_answers(monkeypatch, HIMO_LOSS)


def _in_general(call: Call, *inputs: Any) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        set_plain(patch, (HIMO_LOSS,), lambda plain: None)
        return call(*inputs)


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    *batch, samples, features = shape
    options = {"batch": tuple(batch), "dtype": torch.float64, "generator": generator}
    texts = hkt.power_law(samples, features, mean_offset=1.0, normalize=False, **options)
    images = texts + 0.5 * hkt.power_law(samples, features, normalize=False, **options)
    return images.to(dtype), texts.to(dtype), torch.tensor(20.0, dtype=accumulation_dtype(dtype))


def _leaves(generator: torch.Generator, shape: tuple[int, ...] = (9, 5)) -> list[Tensor]:
    return [x.requires_grad_() for x in _inputs(shape, torch.float32, generator)]


CASES = [
    pytest.param(name, dtype, shape, settings, id=f"{name}-{dtype}-{shape}-{settings}")
    for name in CALLS
    for dtype in DTYPES
    for shape in SHAPES
    if name == "himo_loss" or len(shape) == 2
    for settings in SETTINGS
]


@pytest.mark.parametrize(("name", "dtype", "shape", "settings"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(40)
def test_the_same_bits(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    settings: str,
    layout: str,
    answered: list[bool],
    generator: torch.Generator,
) -> None:
    *features, scale = _inputs(shape, dtype, generator)
    inputs = [LAYOUTS[layout](x) for x in features]
    call = CALLS[name](SETTINGS[settings])
    terms = call(*inputs, scale)
    assert answered[0] == (layout != "negative view")
    assert_same_bits(terms, _in_general(call, *inputs, scale))


@pytest.mark.parametrize(("name", "dtype", "shape", "settings"), CASES)
@pytest.mark.parametrize("layout", LEAF_LAYOUTS)
@pytest.mark.sample(60)
def test_the_same_bits_of_gradients(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    settings: str,
    layout: str,
    answered: list[bool],
    generator: torch.Generator,
) -> None:
    *features, scale = _inputs(shape, dtype, generator)
    features.append(scale.expand(1, 1))
    inputs = [LAYOUTS[layout](x).detach().requires_grad_() for x in features]
    call = CALLS[name](SETTINGS[settings])
    *losses, rank = call(*inputs)
    *expected, expected_rank = _in_general(call, *inputs)
    assert answered == [True]
    for loss in losses:  # the name that anomaly mode prints
        assert loss.grad_fn.name() == "torch::autograd::CppNode<himo::HiMoLoss>"
    assert not rank.requires_grad and rank.grad_fn is None
    assert_same_bits(detached((*losses, rank)), detached((*expected, expected_rank)))
    assert_same_bits(gradients(losses, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_and_its_terms(
    preset: str, answered: list[bool], generator: torch.Generator
) -> None:
    inputs = _leaves(generator, (24, 40))
    module = HiMoLoss(preset, contrastive_weight=0.4, component_weight=0.3)
    options = {"logit_bias": -10.0}
    loss, parts = module(*inputs, **options), module(*inputs, **options, output_dict=True)
    expected = _in_general(lambda *given: (module(*given, **options),), *inputs)
    assert answered == [True, True]
    assert_same_bits((loss.detach(), sum(parts.values()).detach()), detached(expected * 2))
    assert_same_bits(gradients((loss,), inputs), gradients(expected, inputs))


def test_no_problem_at_all(answered: list[bool]) -> None:
    x = torch.ones(0, 3, 2)
    assert [term.shape for term in himo_loss(x, x, 1.0)] == [(0,), (0,), (0,)]
    assert answered == [True]


@each_call
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_kind_of_scale(
    name: str, scale: str, dtype: torch.dtype, answered: list[bool], generator: torch.Generator
) -> None:
    value, plain = SCALES[scale]
    images, texts, _ = _inputs((9, 5), dtype, generator)
    call = CALLS[name]({})
    terms = call(images, texts, value)
    assert answered[0] == plain
    assert_same_bits(terms, _in_general(call, images, texts, value))


GENERAL: dict[str, dict[str, Any]] = {
    "checked values": {"check_finite": True},
    "the reference": {"backend": "reference"},
}


@each_call
@pytest.mark.parametrize("options", GENERAL)
def test_another_form_goes_the_general_way(name: str, options: str, answered: list[bool]) -> None:
    x = torch.eye(6)
    terms = CALLS[name](GENERAL[options])(x, x, 2.0)
    assert answered == []
    torch.testing.assert_close(terms, CALLS[name]({})(x, x, 2.0))
    assert answered == [True]


def test_labels_and_both_decompositions_go_the_general_way(answered: list[bool]) -> None:
    x, labels = torch.eye(6), torch.arange(6)
    expected = HiMoLoss()(x, x, 2.0)
    torch.testing.assert_close(HiMoLoss()(x, x, 2.0, labels=labels), expected)
    assert HiMoLoss(decompose_images=True)(x, x, 2.0).isfinite()
    assert answered == [True]


def test_a_budget_goes_the_general_way(
    answered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.eye(6)
    monkeypatch.setattr(api, "_logits_mib", "1")
    assert himo_loss(x, x, 2.0)[0].isfinite()
    assert answered == []


def test_a_backend_by_name_and_by_the_variable(
    answered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.eye(6)
    HiMoLoss(backend="cpu")(x, x, 2.0)
    monkeypatch.setattr(dispatch, "_default_backend", "cpu")
    HiMoLoss()(x, x, 2.0)
    assert answered == [True, True]
    monkeypatch.setattr(dispatch, "_default_backend", "reference")
    HiMoLoss()(x, x, 2.0)
    assert answered == [True, True]


# Wrong arguments, or such that the extension does not know.
NOT_PLAIN: dict[str, dict[str, Any]] = {
    "threshold of 0": {"variance_threshold": 0.0},
    "threshold as an integer": {"variance_threshold": 1},
    "unknown floor": {"variance_floor": "absolute"},
    "negative floor": {"variance_floor": -1.0},
    "floor as an integer": {"variance_floor": 0},
    "smoothing of 2": {"label_smoothing": 2.0},
    "smoothing of NaN": {"label_smoothing": float("nan")},
    "infinite gap": {"gap_eps": float("inf")},
    "flag that is none": {"normalize_components": 1},
    "keys that are none": {"differentiate_keys": None},
}


@pytest.mark.parametrize("options", NOT_PLAIN)
def test_an_argument_that_is_not_plain_gives_what_it_did(
    options: str, answered: list[bool], generator: torch.Generator
) -> None:
    inputs = _inputs((9, 5), torch.float32, generator)

    def result(general: bool) -> Any:
        call = _operator(NOT_PLAIN[options])
        try:
            return torch.stack((_in_general(call, *inputs) if general else call(*inputs))[:2])
        except (TypeError, ValueError) as error:
            return str(error)

    actual, expected = result(False), result(True)
    assert not any(answered)
    assert type(actual) is type(expected)
    assert actual == expected if isinstance(actual, str) else torch.equal(actual, expected)


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.ones(3), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2, 3), torch.ones(2, 3).double()),
        (torch.ones(2, 3, dtype=torch.int64),) * 2,
        (torch.ones(0, 3),) * 2,
        (torch.ones(2, 3), None),
        (None, torch.ones(2, 3)),
    ],
    ids=["vectors", "shapes", "dtypes", "integers", "no rows", "no texts", "no images"],
)
@each_call
def test_wrong_features_raise_what_they_did(
    name: str, inputs: tuple[Any, Any], answered: list[bool]
) -> None:
    call = CALLS[name]({})
    with pytest.raises((TypeError, ValueError)) as general:
        _in_general(call, *inputs, 2.0)
    with pytest.raises(general.type) as caught:
        call(*inputs, 2.0)
    assert str(caught.value) == str(general.value)
    assert not any(answered)


@each_call
@pytest.mark.parametrize("observer", OBSERVERS)
def test_an_observed_call_goes_the_general_way(
    name: str, observer: str, answered: list[bool]
) -> None:
    x, call = torch.eye(6), CALLS[name]({})
    expected = call(x, x, 2.0)
    with OBSERVERS[observer]():
        terms = call(x, x, 2.0)
    assert answered[0] and not any(answered[1:])
    assert_same_bits(terms, expected)


@each_call
@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_the_gradients_that_are_needed(
    name: str, which: int, answered: list[bool], generator: torch.Generator
) -> None:
    inputs, call = list(_inputs((9, 5), torch.float32, generator)), CALLS[name]({})
    inputs[which].requires_grad_()
    expected = gradients(_in_general(call, *inputs)[:2], [inputs[which]])
    assert_same_bits(gradients(call(*inputs)[:2], [inputs[which]]), expected)
    with torch.no_grad():
        assert not call(*inputs)[0].requires_grad
    assert answered == [True, True]


@each_call
def test_one_loss_of_two(name: str, answered: list[bool], generator: torch.Generator) -> None:
    inputs, call = _leaves(generator), CALLS[name]({})
    losses = call(*inputs)[:2]
    general = _in_general(call, *inputs)
    for loss, of_general in zip(losses, general[:2], strict=True):
        expected = torch.autograd.grad(of_general, inputs, retain_graph=True)
        for _ in range(2):  # the caches are read, not changed
            actual = torch.autograd.grad(loss, inputs, retain_graph=True)
            assert_same_bits(actual, expected)
    assert answered == [True]


def test_one_tensor_as_images_and_texts(answered: list[bool], generator: torch.Generator) -> None:
    x, call = _leaves(generator)[0], HiMoLoss().terms
    expected = gradients(_in_general(call, x, x, 20.0)[:2], [x])
    assert_same_bits(gradients(call(x, x, 20.0)[:2], [x]), expected)
    assert answered == [True]


@pytest.mark.parametrize("shape", [(6, 6), (2, 30)], ids=["logits", "factors"])
def test_caches_that_are_not_small_go_the_general_way(
    shape: tuple[int, int], answered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, width = shape
    x = torch.ones(shape, requires_grad=True)
    floats = max(2 * samples**2, (2 * samples + width) * (min(shape) + 1))
    for most in (4 * floats, 4 * floats - 1):
        monkeypatch.setattr(cpu, "SMALL", most)
        assert himo_loss(x, x, 2.0)[0].requires_grad
    assert answered == [True, False]


def test_features_too_large_for_any_memory_are_not_plain(answered: list[bool]) -> None:
    x = torch.ones(1, 1).expand(2**31, 2**31)  # the bytes of its caches exceed 2^63
    with pytest.raises((RuntimeError, NotImplementedError)):
        himo_loss(x, x, 2.0)
    assert answered == [False]


@each_call
def test_a_second_order_gradient_raises_what_it_did(name: str, answered: list[bool]) -> None:
    x, call = torch.eye(6, requires_grad=True), CALLS[name]({})
    messages = []
    for terms in (call(x, x, 2.0), _in_general(call, x, x, 2.0)):
        with pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(terms[0], x, create_graph=True)
        messages.append(str(caught.value))
    assert answered == [True]
    assert messages[0] == messages[1]


@each_call
def test_features_changed_before_the_backward_are_an_error(name: str, answered: list[bool]) -> None:
    x, y = torch.eye(6, requires_grad=True), torch.eye(6).requires_grad_()
    terms = CALLS[name]({})(x, y, 2.0)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms[0].backward()
    assert answered == [True]


@each_call
def test_saved_tensors_pass_the_hooks(
    name: str, answered: list[bool], generator: torch.Generator
) -> None:
    inputs, call = _leaves(generator), CALLS[name]({})
    expected = gradients(_in_general(call, *inputs)[:2], inputs)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> tuple[Tensor, torch.dtype]:
        packed.append(x)
        return x.double(), x.dtype

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[0].to(kept[1])):
        losses = call(*inputs)[:2]
    given = [x for x in packed if any(x is y or x.shape == y.shape for y in inputs[:2])]
    assert len(given) == (4 if name == "HiMoLoss" else 2)  # normalised, and as given
    assert_same_bits(gradients(losses, inputs), expected)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return call(*inputs)[:2]

    losses = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    assert_same_bits(gradients(losses, inputs), expected)
    assert answered == [True, True]  # the recomputation ends with an exception of a hook


def test_what_a_hook_raises_reaches_the_caller(answered: list[bool]) -> None:
    def pack(x: Tensor) -> Tensor:
        raise LookupError("no room")

    x = torch.eye(6, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with pytest.raises(LookupError, match="no room"), hooks:
        himo_loss(x, x, 2.0)
    assert answered == []


@each_call
@pytest.mark.parametrize("observer", BACKWARD_OBSERVERS)
def test_an_observed_backward_calls_the_operators(
    name: str, observer: str, answered: list[bool], generator: torch.Generator
) -> None:
    inputs, call = _leaves(generator), CALLS[name](SETTINGS["official"])
    expected = gradients(_in_general(call, *inputs)[:2], inputs)
    losses = call(*inputs)[:2]
    weights = weights_of(losses)
    with OBSERVERS[observer]() as seen:
        of_inputs = torch.autograd.grad(losses, inputs, weights)
    assert answered == [True]
    assert_same_bits(of_inputs, expected)
    if observer == "the profiler":
        called = [event.name for event in seen.events() if event.name.startswith("himo_kernels::")]
        normalizes = ["himo_kernels::normalize_bwd"] * 2 if name == "HiMoLoss" else []
        assert called == ["himo_kernels::himo_loss_bwd", *normalizes]


def test_a_batch_of_incoming_gradients(answered: list[bool], generator: torch.Generator) -> None:
    inputs = [x.requires_grad_() for x in _inputs((9, 5), torch.float64, generator)]
    loss = HiMoLoss()(*inputs)
    batch = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    of_batch = torch.autograd.grad(loss, inputs, batch, is_grads_batched=True, retain_graph=True)
    for weight, *of_weight in zip(batch, *of_batch, strict=True):
        expected = torch.autograd.grad(loss, inputs, weight, retain_graph=True)
        assert_same_bits(tuple(of_weight), expected)
    assert answered == [True]


@contextlib.contextmanager
def _matmul_precision(precision: str):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
        assert matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_precision_allowed_at_any_time_changes_no_bit(
    precision: str, answered: list[bool], generator: torch.Generator
) -> None:
    inputs, call = _leaves(generator, (40, 30)), HiMoLoss().terms
    expected = gradients(_in_general(call, *inputs)[:2], inputs)
    losses = call(*inputs)[:2]
    with _matmul_precision(precision):
        of_inputs = gradients(losses, inputs)
        losses = call(*inputs)[:2]
    assert_same_bits(of_inputs, expected)
    assert_same_bits(gradients(losses, inputs), expected)
    assert answered == [True, False, False]  # of HiMoLoss, then of himo_loss


@pytest.mark.parametrize("frozen", [0, 1], ids=["images", "texts"])
def test_frozen_features_are_saved_only_normalised(
    frozen: int, answered: list[bool], generator: torch.Generator
) -> None:
    *features, scale = _inputs((24, 40), torch.float32, generator)
    features[1 - frozen].requires_grad_()
    (expected,) = torch.autograd.grad(HiMoLoss()(*features, scale), features[1 - frozen])
    with torch.inference_mode():  # its tensors cannot be saved for a backward
        of_inference = features[frozen].clone()
    given = list(features)
    given[frozen] = of_inference
    (grad,) = torch.autograd.grad(HiMoLoss()(*given, scale), features[1 - frozen])
    given[frozen] = features[frozen].clone()
    loss = HiMoLoss()(*given, scale)
    given[frozen].zero_()  # as a loader does that fills one buffer
    (of_changed,) = torch.autograd.grad(loss, features[1 - frozen])
    assert answered == [True] * 3
    assert_same_bits((grad, of_changed), (expected, expected))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
def test_a_signal_interrupts_a_call(answered: list[bool]) -> None:
    class Late(Exception):
        pass

    def ring(*_: Any) -> None:
        raise Late

    x = torch.randn(1200, 900, requires_grad=True)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Late):
            himo_loss(x, x, 1.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert answered == []  # the function was left by the exception


@each_call
def test_fake_and_meta_tensors_go_the_general_way(name: str, answered: list[bool]) -> None:
    with FakeTensorMode():
        x = torch.ones(6, 4)
        terms = CALLS[name]({})(x, x, 2.0)
    assert type(terms[0]) is type(x)
    x = torch.ones(6, 4, device="meta")
    assert CALLS[name]({"backend": "reference"})(x, x, 2.0)[0].is_meta
    assert not any(answered)


def test_a_compiled_call_holds_the_operator(answered: list[bool]) -> None:
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(module.graph))
        return module

    x, module = torch.eye(6), HiMoLoss()
    loss = torch.compile(module, backend=keep, fullgraph=True)(x, x, 2.0)
    assert answered == []
    assert len(graphs) == 1 and "himo_loss_fwd" in graphs[0] and "normalize_fwd" in graphs[0]
    assert_same_bits((loss,), (module(x, x, 2.0),))


@each_call
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_surroundings_change_no_bit(
    name: str, surroundings: str, answered: list[bool], generator: torch.Generator
) -> None:
    inputs, call = _inputs((40, 30), torch.float32, generator), CALLS[name](SETTINGS["official"])
    expected = _in_general(call, *inputs)
    with SURROUNDINGS[surroundings]():
        terms = call(*inputs)
    assert answered[0] == (surroundings != "autocast")
    assert terms[0].is_inference() == (surroundings == "inference_mode")
    assert_same_bits(terms, expected)

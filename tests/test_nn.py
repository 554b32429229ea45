"""HiDe and HiMoLoss: presets against independent formulas and the released code's semantics."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines import released
from himo_kernels import testing as hkt
from himo_kernels.nn import PRESETS, HiDe, HiMoLoss


def features(generator, samples=24, width=40, dtype=torch.float64):
    images = torch.randn(samples, width, dtype=torch.float64, generator=generator)
    texts = hkt.power_law(samples, width, dtype=torch.float64, generator=generator)
    texts = 2.5 * texts + 0.3 * images  # not normalised: the loss does that
    logit_scale = torch.tensor(20.0, dtype=dtype)
    return [t.to(dtype).requires_grad_() for t in (images, texts, logit_scale)]


def stated_loss(images, texts, scale, *, tau, smoothing, weight, normalize_components, constants):
    """Semantics sections 1 to 3, with torch.linalg.svd and F.cross_entropy."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    components, _ = hkt.oracle_pca_reconstruct(texts, tau)
    if normalize_components:
        components = F.normalize(components, dim=-1)
    contrastive, component = (
        hkt.oracle_info_nce(images, keys, scale, smoothing, differentiate_keys=not constants)
        for keys in (texts, components)
    )
    return contrastive, component, contrastive + weight * component


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_paper_preset(shape, generator):
    inputs = features(generator, *shape)
    expected = stated_loss(
        *inputs,
        tau=0.9,
        smoothing=0.0,
        weight=1.0,
        normalize_components=True,
        constants=False,
    )
    loss = HiMoLoss(gap_eps=0.0)
    terms, actual = loss.terms(*inputs), loss(*inputs)
    for value, reference in zip((*terms[:2], actual), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    for a, e in zip(gradients(actual, inputs), gradients(expected[2], inputs), strict=True):
        assert hkt.relative_error(a, e) <= 1e-9


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_official_preset_is_the_released_code(shape, generator):
    inputs = features(generator, *shape)
    contrastive, component = released.himo_loss(*inputs, ratio=0.85)
    loss = HiMoLoss("official", gap_eps=0.0)
    terms = loss.terms(*inputs)
    torch.testing.assert_close(terms.contrastive_loss, contrastive, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.component_loss, component, rtol=1e-12, atol=0)
    expected = gradients(contrastive + component, inputs)
    for a, e in zip(gradients(loss(*inputs), inputs), expected, strict=True):
        assert hkt.relative_error(a, e) <= 1e-9


def test_official_preset_in_float32_is_within_the_released_codes_own_error(generator):
    wide = features(generator, 64, 96)
    exact = gradients(sum(released.himo_loss(*wide)), wide)
    inputs = [t.detach().float().requires_grad_() for t in wide]
    theirs = gradients(sum(released.himo_loss(*inputs)), inputs)
    ours = gradients(HiMoLoss("official")(*inputs), inputs)
    for name, a, t, e in zip(("images", "texts", "scale"), ours, theirs, exact, strict=True):
        hkt.assert_within_budget(name, a, t, e, terms=96, constant=2)


@pytest.mark.parametrize(
    "switch",
    [
        {"variance_threshold": 0.5},
        {"component_weight": 0.3},
        {"label_smoothing": 0.2},
        {"normalize_components": False},
        {"gather_with_grad": False},
        {"component_weight": 0.0},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_each_switch_alone(switch, generator):
    inputs = features(generator)
    stated = {
        "tau": switch.get("variance_threshold", 0.9),
        "smoothing": switch.get("label_smoothing", 0.0),
        "weight": switch.get("component_weight", 1.0),
        "normalize_components": switch.get("normalize_components", True),
        "constants": not switch.get("gather_with_grad", True),
    }
    loss = HiMoLoss("paper", gap_eps=0.0, **switch)
    expected = stated_loss(*inputs, **stated)[2]
    actual = loss(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for a, e in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert hkt.relative_error(a, e) <= 1e-9


def test_presets_name_the_same_switches_and_every_switch_is_a_keyword():
    assert PRESETS["paper"].keys() == PRESETS["official"].keys()
    for preset, values in PRESETS.items():
        loss = HiMoLoss(preset, **values)  # every switch is accepted by name
        settings = {**vars(loss), **vars(loss.hide)}
        assert {name: settings[name] for name in values} == values
        other = PRESETS["official" if preset == "paper" else "paper"]
        settings = HiMoLoss(preset, **other)
        settings = {**vars(settings), **vars(settings.hide)}
        assert {name: settings[name] for name in other} == other


def test_unnormalised_features_where_asked(generator):
    inputs = features(generator)
    normalised = [F.normalize(t, dim=-1) for t in inputs[:2]]
    raw = HiMoLoss(normalize_features=False)
    torch.testing.assert_close(raw(*normalised, inputs[2]), HiMoLoss()(*inputs), rtol=1e-12, atol=0)
    assert not torch.allclose(raw(*inputs), HiMoLoss()(*inputs))


def test_constant_basis_switch_changes_the_text_gradient_only(generator):
    inputs = features(generator)
    with_basis = gradients(HiMoLoss()(*inputs), inputs)
    without = gradients(HiMoLoss(differentiate_basis=False)(*inputs), inputs)
    torch.testing.assert_close(without[0], with_basis[0])
    torch.testing.assert_close(without[2], with_basis[2])
    assert hkt.relative_error(without[1], with_basis[1]) > 0.01


def test_pca_scopes_agree_in_one_process(generator):
    inputs = features(generator)
    assert torch.equal(HiMoLoss(pca_scope="local")(*inputs), HiMoLoss(pca_scope="global")(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype, generator):
    exact = HiMoLoss()(*features(generator))
    generator.manual_seed(generator.initial_seed())
    images, texts, scale = features(generator, dtype=dtype)
    loss = HiMoLoss()(images, texts, scale.detach().float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=40 * torch.finfo(dtype).eps, atol=0)
    loss.backward()
    assert images.grad.dtype == texts.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", hkt.DEGENERATE)
def test_degenerate_captions_are_finite(preset, name, dtype, generator):
    texts = hkt.DEGENERATE[name](48, 64, dtype=dtype, generator=generator).requires_grad_()
    images = torch.randn(48, 64, generator=generator).to(dtype).requires_grad_()
    loss = HiMoLoss(preset)(images, texts, 100.0)
    loss.backward()
    assert loss.isfinite() and images.grad.isfinite().all() and texts.grad.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_of_zeros_gets_no_gradient(preset, generator):
    images, texts, scale = features(generator, dtype=torch.float16)
    images.data[2], texts.data[3] = 0, 0
    loss = HiMoLoss(preset, differentiate_basis=False)(images, texts, scale.detach())
    loss.backward()
    assert loss.isfinite() and images.grad.isfinite().all() and texts.grad.isfinite().all()
    assert (images.grad[2] == 0).all() and (texts.grad[3] == 0).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_length_of_the_features_does_not_matter(magnitude, generator):
    images, texts, scale = features(generator, dtype=torch.float32)
    expected = HiMoLoss()(images, texts, scale)
    actual = HiMoLoss()(images * magnitude, texts * magnitude, scale)
    torch.testing.assert_close(actual, expected)


def test_the_official_preset_has_the_released_codes_floor(generator):
    # Normalised rows whose trace is 1e-9: below 1e-8, far above rounding.
    images, texts, scale = (t.detach() for t in features(generator))
    texts = texts[:1] / texts[0].norm() + 1e-6 * torch.randn(24, 40, generator=generator).double()
    texts = F.normalize(texts, dim=-1)
    assert torch.equal(released.cumulative_ratio_pca(texts, 0.85), texts)
    assert HiMoLoss("official").terms(images, texts, scale).rank == 24
    for loss in (HiMoLoss("paper"), HiMoLoss("official", variance_floor="relative")):
        assert loss.terms(images, texts, scale).rank == HiDe(loss.hide.variance_threshold)(texts)[1]
        assert loss.terms(images, texts, scale).rank < 24


def test_hide_returns_components_and_rank(generator):
    texts = hkt.power_law(24, 40, dtype=torch.float64, generator=generator)
    components, rank = HiDe(0.8)(texts)
    expected, expected_rank = hkt.oracle_pca_reconstruct(texts, 0.8)
    torch.testing.assert_close(components, expected, rtol=0, atol=1e-12)
    assert rank == expected_rank


def test_the_rank_is_one_of_the_terms(generator):
    images, texts, scale = features(generator)
    loss = HiMoLoss()
    assert loss.terms(images, texts, scale).rank == HiDe()(F.normalize(texts, dim=-1))[1]
    assert not loss.state_dict()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
def test_the_dict_adds_up_to_the_loss_as_trainers_add_it(weight, generator):
    # open_clip 3.3.0 adds all values, its repository those whose key ends in _loss.
    inputs = features(generator)
    loss = HiMoLoss(component_weight=weight)
    losses = loss(*inputs, output_dict=True)
    assert list(losses) == ["contrastive_loss", "component_loss"]
    assert sum(losses.values()) == loss(*inputs)
    assert sum(v for k, v in losses.items() if k.endswith("_loss")) == loss(*inputs)
    terms = loss.terms(*inputs)
    assert losses["contrastive_loss"] == terms.contrastive_loss
    assert losses["component_loss"] == weight * terms.component_loss


@pytest.mark.parametrize("bias", [torch.tensor(-10.0), torch.tensor([3.0]), -10.0, 2], ids=str)
def test_a_constant_bias_changes_nothing_and_gets_no_gradient(bias, generator):
    inputs = features(generator, dtype=torch.float32)
    loss, leaves = HiMoLoss(), list(inputs)
    if isinstance(bias, torch.Tensor):
        leaves.append(bias := bias.clone().requires_grad_())
    expected = loss(*inputs)
    actual = loss(*inputs, bias)
    assert actual == expected and actual.dtype == torch.float32
    assert sum(loss(*inputs, logit_bias=bias, output_dict=True).values()) == expected
    found = gradients(actual, leaves)
    assert all(map(torch.equal, found, gradients(expected, inputs)))
    assert all((gradient == 0).all() for gradient in found[3:])
    # The expected loss if the bias is added explicitly.
    images, texts = (F.normalize(t.detach(), dim=-1) for t in inputs[:2])
    logits = inputs[2].detach() * images @ texts.T + bias
    labels = torch.arange(len(logits))
    added = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(loss.terms(*inputs).contrastive_loss, added)


def test_a_bool_in_fourth_place_is_output_dict(generator):
    inputs, loss = features(generator), HiMoLoss()
    losses = loss(*inputs, output_dict=True)
    assert loss(*inputs, True) == losses == loss(*inputs, None, True)
    assert loss(*inputs, False) == loss(*inputs)


@pytest.mark.parametrize(
    "bias, error, words",
    [
        (torch.zeros(24), ValueError, r"expected logit_bias of shape \[\] or \[1\], got \[24\]"),
        ("-10", TypeError, "expected logit_bias to be a number, got str"),
        (
            torch.tensor(2j),
            TypeError,
            "expected logit_bias of dtype float16, .*, got torch.complex64",
        ),
    ],
    ids=str,
)
def test_a_bias_that_is_no_constant_is_refused(bias, error, words, generator):
    with pytest.raises(error, match=f"HiMoLoss: {words}"):
        HiMoLoss()(*features(generator), bias)


def test_a_call_leaves_no_trace_on_the_module(generator):
    # Nor in a compiled graph, which would write it again, to memory that it reuses.
    inputs, loss = [t.detach() for t in features(generator)], HiMoLoss()
    before, expected = dict(vars(loss)), loss(*inputs)
    compiled = torch.compile(loss.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    assert vars(loss) == before


def test_training_with_the_loss_aligns_the_pairs(generator):
    # Plain gradient descent on the features. Some steps raise the loss: if a step changes the rank,
    # the components jump.
    images, texts, scale = features(generator, dtype=torch.float32)
    loss, history = HiMoLoss(), []
    for _ in range(10):
        value = loss(images, texts, scale.detach())
        history.append(value.item())
        for tensor, grad in zip((images, texts), gradients(value, (images, texts)), strict=True):
            tensor.data -= 0.5 * grad
    assert history[-1] < 0.9 * history[0]


def _masked_loss(images, keys, scale, labels, smoothing, constants):
    """InfoNCE whose pairs of equal labels, except the diagonal, are taken out of the softmax."""
    hidden = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)

    def direction(own, others):
        logits = scale * own @ (others.detach() if constants else others).T
        log_p = logits.masked_fill(hidden, -torch.inf).log_softmax(1)
        mean = log_p.masked_fill(hidden, 0.0).sum(1) / (~hidden).sum(1)
        return -((1 - smoothing) * log_p.diagonal() + smoothing * mean).mean()

    return (direction(images, keys) + direction(keys, images)) / 2


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_pairs_of_equal_labels_are_no_negatives(preset, dtype, generator):
    inputs = features(generator)
    labels = torch.randint(9, (24,), generator=generator, dtype=dtype) - 4
    switches = PRESETS[preset]
    loss = HiMoLoss(preset, gap_eps=0.0)
    terms, actual = loss.terms(*inputs, labels=labels), loss(*inputs, labels=labels)
    images, texts = (F.normalize(x, dim=-1) for x in inputs[:2])
    components, _ = hkt.oracle_pca_reconstruct(texts, switches["variance_threshold"])
    if switches["normalize_components"]:
        components = F.normalize(components, dim=-1)
    settings = (labels, switches["label_smoothing"], not switches["gather_with_grad"])
    expected = [_masked_loss(images, keys, inputs[2], *settings) for keys in (texts, components)]
    for value, exact in zip((*terms[:2], actual), (*expected, sum(expected)), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    for a, e in zip(gradients(actual, inputs), gradients(sum(expected), inputs), strict=True):
        assert hkt.relative_error(a, e) <= 1e-9


def test_labels_without_repeats_change_only_the_rounding(generator):
    inputs = features(generator)
    labels = torch.randperm(24, generator=generator)
    loss = HiMoLoss()
    torch.testing.assert_close(loss(*inputs, labels=labels), loss(*inputs), rtol=1e-12, atol=0)
    as_dict = loss(*inputs, output_dict=True, labels=labels)
    torch.testing.assert_close(sum(as_dict.values()), loss(*inputs), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        (torch.arange(23), ValueError, "labels of shape [24], got [23]"),
        (torch.zeros(24), TypeError, "labels to be an int64 or int32 tensor, got torch.float32"),
        (list(range(24)), TypeError, "labels to be an int64 or int32 tensor, got list"),
    ],
    ids=["shape", "dtype", "list"],
)
def test_bad_labels_are_refused(labels, error, text, generator):
    with pytest.raises(error) as caught:
        HiMoLoss()(*features(generator), labels=labels)
    assert str(caught.value) == f"HiMoLoss: expected {text}"

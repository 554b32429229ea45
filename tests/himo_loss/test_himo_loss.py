"""himo_loss against the stated formula in float64, by gradcheck, and on what breaks an SVD."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import himo_kernels
from himo_kernels import extension
from himo_kernels import testing as hkt
from himo_kernels.himo_loss import himo_loss
from himo_kernels.presets import PRESETS

BACKENDS = hkt.runnable_backends("himo_loss")
SIDES = [(40, 24), (24, 24), (24, 40)]  # N > D, N = D, N < D
per_backend = pytest.mark.parametrize("backend", BACKENDS)
per_side = pytest.mark.parametrize("shape", SIDES, ids=["N>D", "N=D", "N<D"])
SWITCHES = {
    "paper": {},
    "official": {
        "variance_threshold": 0.85,
        "normalize_components": False,
        "label_smoothing": 0.1,
        "differentiate_keys": False,
    },
    "few components": {"variance_threshold": 0.3},
    "constant keys": {"differentiate_keys": False},
    "smoothed": {"label_smoothing": 0.2},
    "unnormalised": {"normalize_components": False},
}
per_switch = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)


def inputs_of(generator, *shape, dtype=torch.float64, scale=20.0, unit=True, offset=1.0):
    """Images, texts and the scale, which require gradients; the pairs are about alike."""
    *batch, samples, features = shape
    options = {"batch": tuple(batch), "dtype": torch.float64, "generator": generator}
    texts = hkt.power_law(samples, features, mean_offset=offset, normalize=unit, **options)
    images = texts + 0.5 * hkt.power_law(samples, features, normalize=unit, **options)
    if unit:
        images = F.normalize(images, dim=-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(scale, dtype=wide).requires_grad_()
    return *(x.to(dtype).requires_grad_() for x in (images, texts)), scale


def stated(
    images: Tensor,  # [N, D]
    texts: Tensor,  # [N, D]
    scale: Tensor,
    variance_threshold: float = 0.9,
    normalize_components: bool = True,
    label_smoothing: float = 0.0,
    differentiate_keys: bool = True,
) -> tuple[Tensor, Tensor]:
    """Both losses in the words of torch.linalg.svd and F.cross_entropy, in the dtype of images."""
    mean = texts.mean(0)
    _, singular_values, right = torch.linalg.svd(texts - mean, full_matrices=False)
    share = singular_values.double().square().cumsum(0) / singular_values.double().square().sum()
    basis = right[: int((share < variance_threshold).sum()) + 1]
    components = (texts - mean) @ basis.T @ basis + mean
    if normalize_components:
        components = F.normalize(components, dim=-1)
    return tuple(
        hkt.oracle_info_nce(images, keys, scale, label_smoothing, differentiate_keys)
        for keys in (texts, components)
    )


def composed(images, texts, scale, *, backend, **options):
    """The three operators, one after the other."""
    hide = {k: options[k] for k in ("gap_eps", "differentiate_basis") if k in options}
    components, rank = himo_kernels.pca_reconstruct(
        texts, options.get("variance_threshold", 0.9), backend=backend, **hide
    )
    if options.get("normalize_components", True):
        components = himo_kernels.normalize(components, backend=backend)
    loss = {k: options[k] for k in ("label_smoothing", "differentiate_keys") if k in options}
    losses = himo_kernels.dual_info_nce(images, texts, components, scale, backend=backend, **loss)
    return *losses, rank


def gradients(losses, inputs, weights=(1.0, 0.7)):
    total = sum(w * loss.sum() for w, loss in zip(weights, losses, strict=True))
    return torch.autograd.grad(total, inputs)


@per_backend
@per_side
@per_switch
def test_equals_the_stated_formula(backend, shape, switches, generator):
    inputs = inputs_of(generator, *shape)
    expected = stated(*inputs, **switches)
    actual = himo_loss(*inputs, gap_eps=0.0, backend=backend, **switches)
    torch.testing.assert_close(actual[:2], expected, rtol=1e-12, atol=1e-12)
    for name, a, e in zip(
        ("images", "texts", "scale"),
        gradients(actual[:2], inputs),
        gradients(expected, inputs),
        strict=True,
    ):
        assert hkt.relative_error(a, e) <= 1e-9, name


@per_backend
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (2, 7, 5), (2, 2, 4, 6)], ids=str)
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(backend, shape, threshold, normalize, generator):
    images, texts = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    scale = torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: himo_loss(
            *inputs,
            variance_threshold=threshold,
            normalize_components=normalize,
            label_smoothing=0.1,
            gap_eps=0.0,
            backend=backend,
        )[:2],
        [x.requires_grad_() for x in (images, texts, scale)],
        fast_mode=True,
    )


@per_backend
@per_side
@per_switch
@pytest.mark.parametrize("basis", [True, False], ids=["basis", "constant basis"])
def test_equals_the_three_operators(backend, shape, switches, basis, generator):
    inputs = inputs_of(generator, *shape)
    options = {**switches, "differentiate_basis": basis, "gap_eps": 1e-3}
    expected = composed(*inputs, backend="reference", **options)
    actual = himo_loss(*inputs, backend=backend, **options)
    torch.testing.assert_close(tuple(actual), expected, rtol=1e-12, atol=1e-12)
    expected = gradients(expected[:2], inputs)
    for a, e in zip(gradients(actual[:2], inputs), expected, strict=True):
        assert hkt.relative_error(a, e) <= 1e-10


@per_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(160, 64), (48, 96)], ids=["N>D", "N<D"])
@pytest.mark.parametrize("offset", [1.0, 8.0])
@per_switch
def test_within_the_error_budget(backend, dtype, shape, offset, switches, generator):
    inputs = inputs_of(generator, *shape, dtype=dtype, offset=offset)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = stated(*wide, **switches)
    exact_grads = gradients(exact, wide)
    eager = composed(*inputs, backend="reference", gap_eps=0.0, **switches)[:2]
    actual = himo_loss(*inputs, gap_eps=0.0, backend=backend, **switches)[:2]
    constant = 1 + inputs[2].item() / 4
    names = ("contrastive", "component", "images", "texts", "scale")
    results = zip(
        names,
        (*actual, *gradients(actual, inputs)),
        (*eager, *gradients(eager, inputs)),
        (*exact, *exact_grads),
        strict=True,
    )
    for name, a, e, x in results:
        if a.dim() == 0 and dtype != torch.float32:  # one number: the error of eager may be luck
            assert hkt.relative_error(a, x) <= torch.finfo(dtype).eps / 4, name
        else:
            hkt.assert_within_budget(name, a, e, x, terms=max(shape), constant=constant)


@per_backend
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 256)], ids=["N>D", "N<D", "shared"])
def test_a_narrow_gap_at_the_cut(backend, gap, shape, generator):
    values = torch.linspace(2, 1, 30, dtype=torch.float64)
    values[15:] *= (values[14] * (1 - gap)) / values[15]
    texts = hkt.controlled_spectrum(values, *shape, dtype=torch.float32, generator=generator)
    images = torch.randn(shape, generator=generator)
    share = float((values[:15].sum() - values[14] / 2) / values.sum())
    options = {"variance_threshold": share}
    inputs = [x.requires_grad_() for x in (images, texts, torch.tensor(1.0))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = gradients(stated(*wide, **options), wide)
    eager = composed(*inputs, backend=backend, gap_eps=0.0, **options)
    assert eager[2] == 15
    actual = himo_loss(*inputs, gap_eps=0.0, backend=backend, **options)
    for name, a, e, x in zip(
        ("images", "texts", "scale"),
        gradients(actual[:2], inputs),
        gradients(eager[:2], inputs),
        exact,
        strict=True,
    ):
        # The rounding of dL/dS alone is divided by the gap: over 100 seeds either form has a few
        # errors above 2e-6, 4e-5 at most at 1e-5.
        assert hkt.relative_error(a, x) <= 2e-6 + 4 * hkt.relative_error(e, x), name


@per_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("switches", [SWITCHES["paper"], SWITCHES["official"]])
@pytest.mark.parametrize("name", hkt.DEGENERATE)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)], ids=["N<D", "N>D"])
def test_degenerate_captions_are_finite(backend, shape, name, switches, dtype, generator):
    texts = hkt.DEGENERATE[name](*shape, dtype=dtype, generator=generator).requires_grad_()
    images = F.normalize(torch.randn(shape, generator=generator), dim=-1).to(dtype).requires_grad_()
    actual = himo_loss(images, texts, 100.0, backend=backend, **switches)
    # Of the same backend: inside a block of equal eigenvalues every basis is right.
    expected = composed(images, texts, 100.0, backend=backend, **switches)
    assert actual.rank == expected[2]
    tolerance = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[:2], expected[:2], rtol=tolerance, atol=tolerance)
    assert all(g.isfinite().all() for g in gradients(actual[:2], (images, texts)))


@per_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_text_without_a_direction_has_bounded_logits(backend, dtype, generator):
    # All components of an empty caption: they cancel its mean, and only rounding is left.
    images, texts, scale = inputs_of(generator, 40, 64, dtype=dtype, scale=100.0)
    with torch.no_grad():
        texts[5] = 0
    losses = himo_loss(images, texts, scale, variance_threshold=1.0, backend=backend)
    # Cosines are within [-1, 1], so no nll is above log N + 2 s.
    assert losses[1] <= math.log(40) + 2 * 100
    assert all(g.isfinite().all() for g in gradients(losses[:2], (images, texts, scale)))
    assert losses[0].isfinite()


@per_backend
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("features", [1, 5])
def test_one_and_two_samples(backend, samples, features, generator):
    images, texts = (
        torch.randn(samples, features, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(2)
    )
    actual = himo_loss(images, texts, 3.0, backend=backend)
    expected = composed(images, texts, 3.0, backend="reference")
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-12, atol=1e-14)
    for a, e in zip(
        gradients(actual[:2], (images, texts)),
        gradients(expected[:2], (images, texts)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@per_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=["N>D", "N<D"])
def test_nan_in_nan_out(backend, bad, shape, generator):
    images, texts = (torch.randn(2, *shape, generator=generator) for _ in range(2))
    texts[1, 2, 3] = bad
    inputs = [x.requires_grad_() for x in (images, texts)]
    losses = himo_loss(*inputs, 3.0, backend=backend)[:2]
    assert all(loss[0].isfinite() and not loss[1].isfinite() for loss in losses)
    assert losses[1][1].isnan()
    for grad in gradients(losses, inputs):
        assert grad[0].isfinite().all() and grad[1].isnan().all()


@per_backend
@per_side
def test_leading_dimensions_are_independent_problems(backend, shape, generator):
    inputs = inputs_of(generator, 2, 3, *shape)
    batched = himo_loss(*inputs, backend=backend)
    grads = gradients(batched[:2], inputs)
    assert batched.rank.shape == (2, 3)
    scale_grad = 0.0
    for i in range(2):
        for j in range(3):
            own = [x[i, j].detach().requires_grad_() for x in inputs[:2]]
            own.append(inputs[2].detach().requires_grad_())
            alone = himo_loss(*own, backend=backend)
            for a, b in zip(alone, batched, strict=True):
                torch.testing.assert_close(a, b[i, j], rtol=1e-12, atol=1e-13)
            own_grads = gradients(alone[:2], own)
            for a, b in zip(own_grads[:2], grads[:2], strict=True):
                torch.testing.assert_close(a, b[i, j], rtol=1e-9, atol=1e-11)
            scale_grad = scale_grad + own_grads[2]
    torch.testing.assert_close(scale_grad, grads[2])


# An easy problem, then one with a long mean, one with a narrow gap and one with few components.
def mixed_batch(generator):
    images, near, scale = inputs_of(generator, 24, 40, offset=0.5)
    far = inputs_of(generator, 24, 40, offset=20.0)[1]
    values = torch.linspace(2, 1, 20, dtype=torch.float64) * 100
    values[10:] *= values[9] * (1 - 1e-4) / values[10]
    narrow = hkt.controlled_spectrum(values, 24, 40, generator=generator)
    few = hkt.power_law(24, 40, exponent=6.0, dtype=torch.float64, generator=generator)
    texts = torch.stack([x.detach() for x in (near, far, narrow, few)])
    images = images.detach().expand_as(texts).clone()
    return images.requires_grad_(), texts.requires_grad_(), scale


@per_backend
@pytest.mark.parametrize("basis", [True, False], ids=["basis", "constant basis"])
@per_switch
def test_a_batch_of_easy_and_hard_problems(backend, basis, switches, generator):
    inputs = mixed_batch(generator)
    options = {**switches, "differentiate_basis": basis, "gap_eps": 1e-3}
    expected = composed(*inputs, backend="reference", **options)
    actual = himo_loss(*inputs, backend=backend, **options)
    torch.testing.assert_close(tuple(actual), expected, rtol=1e-12, atol=1e-12)
    expected = gradients(expected[:2], inputs)
    for a, e in zip(gradients(actual[:2], inputs), expected, strict=True):
        for of_problem, e_of_problem in zip(a, e, strict=True) if a.dim() else [(a, e)]:
            assert hkt.relative_error(of_problem, e_of_problem) <= 1e-9


@per_backend
@pytest.mark.parametrize(
    "offsets", [(0.0, 0.0), (0.3, 0.5), (1.0, 1.0), (2.0, 2.0), (3.0, 1.0)], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_images_and_texts_that_share_a_direction(backend, offsets, scale, generator):
    # V U^T is then mostly v . mu, next to which what distinguishes the texts is rounded.
    shape, options = (128, 512), {"dtype": torch.float64, "generator": generator}
    shared = F.normalize(torch.randn(512, **options), dim=0)
    texts = hkt.power_law(*shape, mean_offset=0.0, normalize=True, **options)
    images = texts + hkt.power_law(*shape, mean_offset=0.0, normalize=True, **options)
    given = (
        F.normalize(F.normalize(x, dim=-1) + offset * shared, dim=-1).float().requires_grad_()
        for x, offset in zip((images, texts), offsets, strict=True)
    )
    inputs = [*given, torch.tensor(scale, requires_grad=True)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = gradients(stated(*wide), wide)
    eager = gradients(composed(*inputs, backend="reference", gap_eps=0.0)[:2], inputs)
    actual = gradients(himo_loss(*inputs, gap_eps=0.0, backend=backend)[:2], inputs)
    for name, a, e, x in zip(("images", "texts", "scale"), actual, eager, exact, strict=True):
        hkt.assert_within_budget(name, a, e, x, terms=512, constant=1 + scale / 4)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the extension")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_with_and_without_caches_is_the_same(which, generator, monkeypatch):
    images, texts, scale = (x.detach().float() for x in inputs_of(generator, 48, 96, offset=0.5))
    inputs = [images, texts, scale]
    inputs[which].requires_grad_()
    found = []
    for budget in ("100", "0"):
        monkeypatch.setattr(sys.modules["himo_kernels.info_nce.api"], "_logits_mib", budget)
        losses = himo_loss(*inputs, backend="cpu")[:2]
        found.append((*losses, *gradients(losses, [inputs[which]])))
    with torch.no_grad():
        alone = himo_loss(*inputs, backend="cpu")[:2]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, found[0][:2], strict=True))


@per_backend
def test_scale_of_the_texts_does_not_matter(backend, generator):
    # With normalised components, the length of the rows does not change the component loss.
    images, texts, scale = inputs_of(generator, 48, 32, dtype=torch.float32)
    expected = himo_loss(images, texts, scale, backend=backend).component_loss
    for factor in (2.0**-60, 2.0**-20, 2.0**20, 2.0**60):
        scaled = himo_loss(images, texts * factor, scale, backend=backend).component_loss
        torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-6)
        assert torch.autograd.grad(scaled, images)[0].isfinite().all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the extension")
@per_switch
def test_any_backward_accepts_any_forward(switches, generator, monkeypatch):
    # Without kept logits, which a backend passes to itself alone.
    monkeypatch.setattr(sys.modules["himo_kernels.info_nce.api"], "_logits_mib", "0")
    inputs = inputs_of(generator, 40, 24)
    expected = gradients(himo_loss(*inputs, backend="reference", **switches)[:2], inputs)
    for forward, backward in (("cpu", "reference"), ("reference", "cpu")):
        losses = himo_loss(*inputs, backend=forward, **switches)[:2]
        losses[0].grad_fn.backend = backward
        for a, e in zip(gradients(losses, inputs), expected, strict=True):
            assert hkt.relative_error(a, e) <= 1e-10


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_the_operator(preset, generator):
    inputs = inputs_of(generator, 32, 48, unit=False)
    terms = himo_kernels.nn.HiMoLoss(preset).terms(*inputs)
    unit = [F.normalize(x, dim=-1) for x in inputs[:2]]
    switches = SWITCHES[preset]
    floor = PRESETS[preset]["variance_floor"]
    expected = himo_loss(*unit, inputs[2], variance_floor=floor, **switches)
    torch.testing.assert_close(tuple(terms), tuple(expected), rtol=1e-12, atol=1e-12)


def test_constant_keys_with_confident_columns(generator):
    # A common direction of the images makes the rows uncertain and leaves the columns confident.
    # The column half of dS' must not come from the difference of two larger gradients.
    texts = hkt.power_law(128, 256, generator=generator, dtype=torch.float64)
    common = F.normalize(torch.randn(256, generator=generator, dtype=torch.float64), dim=0)
    noise = F.normalize(torch.randn(128, 256, generator=generator, dtype=torch.float64), dim=-1)
    images = F.normalize(F.normalize(texts - texts.mean(0), dim=-1) + common + 0.3 * noise, dim=-1)
    images, texts = images.float(), texts.float()

    def grad(images, texts, backend):
        texts = texts.clone().requires_grad_()
        losses = himo_loss(
            images,
            texts,
            100.0,
            variance_threshold=0.85,
            normalize_components=False,
            differentiate_keys=False,
            backend=backend,
        )[:2]
        return torch.autograd.grad(sum(losses), texts)[0]

    exact = grad(images.double(), texts.double(), "reference")
    plain = hkt.relative_error(grad(images, texts, "reference"), exact)
    assert hkt.relative_error(grad(images, texts, "cpu"), exact) <= 4 * plain + 2e-6


def backward_arguments(generator, *shape):
    """Valid arguments of the extension's himo_loss_bwd, by name."""
    images, texts = (torch.randn(shape, generator=generator) for _ in range(2))
    scale = torch.tensor(3.0)
    outputs = extension.load().himo_loss_fwd(
        images, texts, scale, 0.6, (0, 0), True, 0.0, None, None
    )
    _, rows, columns, _, component_rows, component_columns, *decomposition = outputs
    ones = torch.ones(shape[:-2])
    tensors = (ones, ones, images, texts, scale, rows, columns, component_rows, component_columns)
    names = (
        *("grad_contrastive_loss", "grad_component_loss", "images", "texts", "scale", "row_nll"),
        *("column_nll", "component_row_nll", "component_column_nll", "mean", "eigenvalues"),
        *("eigenvectors", "rank"),
    )
    return dict(zip(names, (*tensors, *decomposition), strict=True))


def backward(arguments):
    settings = (True, 0.0, True, True, 1e-3, True, True, None, None)
    return extension.load().himo_loss_bwd(*arguments.values(), *settings)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the extension")
@pytest.mark.parametrize("shape", [(9, 5), (2, 5, 9)], ids=str)
def test_the_extension_refuses_a_wrong_tensor(shape, generator):
    # A direct call must raise, never read out of bounds.
    arguments = backward_arguments(generator, *shape)
    assert all(grad.isfinite().all() for grad in backward(arguments))
    for name, value in arguments.items():
        wrong = [value.unsqueeze(0).expand(3, *value.shape), value.to("meta")]
        wrong += [value[..., :1]] if value.dim() else []
        if name in ("mean", "eigenvalues", "eigenvectors", "rank"):
            wrong.append(value.to(torch.int32))
        for bad in wrong:
            with pytest.raises((ValueError, TypeError), match="himo_loss|info_nce"):
                backward({**arguments, name: bad})


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the extension")
@pytest.mark.parametrize("name", ["images", "texts", "mean", "eigenvectors"])
def test_the_extension_reads_lazily_negated_tensors(name, generator):
    arguments = backward_arguments(generator, 9, 5)
    negated = torch._neg_view(arguments[name].neg())
    for a, e in zip(backward({**arguments, name: negated}), backward(arguments), strict=True):
        assert torch.equal(a, e)

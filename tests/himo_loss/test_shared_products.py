"""himo_loss of few samples, whose losses share the products of images and centred texts."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_himo_loss import BACKENDS, composed, gradients, per_backend, per_switch, stated

from himo_kernels import testing as hkt
from himo_kernels.himo_loss import himo_loss

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the extension")


def sharing_a_direction(generator, *shape, offset, scale=1.0, dtype=torch.float32):
    """Images, texts and the scale; offset times one vector is added to all rows of length 1."""
    options = {"dtype": torch.float64, "generator": generator}
    shared = F.normalize(torch.randn(shape[-1], **options), dim=0)
    texts = hkt.power_law(*shape, mean_offset=0.0, **options)
    images = texts + hkt.power_law(*shape, mean_offset=0.0, **options)
    rows = (F.normalize(F.normalize(x, dim=-1) + offset * shared, dim=-1) for x in (images, texts))
    return [x.to(dtype).requires_grad_() for x in (*rows, torch.tensor(scale))]


@per_backend
@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("samples", [64, 96])
def test_the_rounding_is_about_that_of_the_three_operators(backend, samples, offset, generator):
    # At a scale of 1 dU is the difference of larger products. Sums over 768 terms in a row, or
    # products of texts that are not centred, would be 5 to 200 times as inexact.
    errors = []
    for _ in range(6):
        inputs = sharing_a_direction(generator, samples, 768, offset=offset)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        exact = gradients(himo_loss(*wide, gap_eps=0.0, backend="reference")[:2], wide)[:2]
        actual = himo_loss(*inputs, gap_eps=0.0, backend=backend)[:2]
        eager = composed(*inputs, gap_eps=0.0, backend="reference")[:2]
        found = [gradients(losses, inputs)[:2] for losses in (actual, eager)]
        errors.append(
            [
                [hkt.relative_error(a, e) for a, e in zip(grads, exact, strict=True)]
                for grads in found
            ]
        )
    actual, eager = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt()
    assert (actual <= 5 * eager).all(), (actual, eager)


@needs_cpu
@per_switch
@pytest.mark.parametrize("basis", [True, False], ids=["basis", "constant basis"])
def test_every_subset_of_gradients_has_the_same_bits(switches, basis, generator):
    inputs = sharing_a_direction(generator, 64, 128, offset=1.0, scale=20.0)
    options = {**switches, "differentiate_basis": basis, "backend": "cpu"}
    expected = gradients(himo_loss(*inputs, **options)[:2], inputs)
    for subset in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        given = [x.detach().requires_grad_(i in subset) for i, x in enumerate(inputs)]
        needed = [given[i] for i in subset]
        actual = gradients(himo_loss(*given, **options)[:2], needed)
        for i, grad in zip(subset, actual, strict=True):
            assert torch.equal(grad, expected[i])


@needs_cpu
@per_switch
def test_a_problem_is_the_same_beside_others(switches, generator):
    shared = sharing_a_direction(generator, 64, 128, offset=1.0, scale=20.0)
    others = sharing_a_direction(generator, 64, 128, offset=0.0)
    few = hkt.power_law(64, 128, exponent=6.0, generator=generator)  # too few to share products
    texts = torch.stack([shared[1], few, others[1]]).detach().requires_grad_()
    images = torch.stack([shared[0], others[0], others[0]]).detach().requires_grad_()
    batch = (images, texts, shared[2])
    losses = himo_loss(*batch, backend="cpu", **switches)[:2]
    grads = gradients(losses, batch)
    for b in range(3):
        own = [x[b].detach().requires_grad_() for x in batch[:2]]
        alone = himo_loss(*own, shared[2], backend="cpu", **switches)[:2]
        found, expected = ([x[b] for x in (*losses, *grads[:2])], (*alone, *gradients(alone, own)))
        # The same bits unless the products are MKL's.
        for x, y in zip(found, expected, strict=True):
            assert hkt.relative_error(x, y) <= 2e-5


@per_backend
@per_switch
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_equals_the_stated_formula(backend, switches, offset, generator):
    inputs = sharing_a_direction(generator, 64, 128, offset=offset, scale=20.0, dtype=torch.float64)
    expected = stated(*inputs, **switches)
    actual = himo_loss(*inputs, gap_eps=0.0, backend=backend, **switches)
    torch.testing.assert_close(actual[:2], expected, rtol=1e-12, atol=1e-12)
    grads = gradients(expected, inputs)
    for a, e in zip(gradients(actual[:2], inputs), grads, strict=True):
        assert hkt.relative_error(a, e) <= 1e-9


@per_backend
@per_switch
@pytest.mark.parametrize("basis", [True, False], ids=["basis", "constant basis"])
@pytest.mark.parametrize("weights", [(1.0, 0.7), (0.0, 1.0), (1.0, 0.0)], ids=str)
def test_a_batch_equals_the_three_operators(backend, switches, basis, weights, generator):
    # Of the problems, one has a long mean, one a narrow gap, and one too few components to share.
    wide = {"dtype": torch.float64, "generator": generator}
    options = {"offset": 1.0, "scale": 20.0, "dtype": torch.float64}
    images, texts, scale = sharing_a_direction(generator, 64, 128, **options)
    values = torch.linspace(2, 1, 60, dtype=torch.float64) * 100
    values[30:] *= values[29] * (1 - 1e-4) / values[30]
    narrow = hkt.controlled_spectrum(values, 64, 128, generator=generator)
    others = (
        hkt.power_law(64, 128, mean_offset=20.0, **wide),
        narrow,
        hkt.power_law(64, 128, exponent=6.0, **wide),
    )
    texts = torch.stack([texts.detach(), *others]).requires_grad_()
    inputs = (images.detach().expand_as(texts).clone().requires_grad_(), texts, scale)
    options = {**switches, "differentiate_basis": basis, "gap_eps": 1e-3}
    expected = composed(*inputs, backend="reference", **options)
    actual = himo_loss(*inputs, backend=backend, **options)
    torch.testing.assert_close(tuple(actual), expected, rtol=1e-12, atol=1e-12)
    grads = gradients(expected[:2], inputs, weights)
    for a, e in zip(gradients(actual[:2], inputs, weights), grads, strict=True):
        for of_problem, e_of_problem in zip(a, e, strict=True) if a.dim() else [(a, e)]:
            assert hkt.relative_error(of_problem, e_of_problem) <= 1e-9


@needs_cpu
@pytest.mark.parametrize("which", [0, 1, 2])
def test_with_and_without_caches_is_the_same(which, generator, monkeypatch):
    inputs = sharing_a_direction(generator, 64, 128, offset=1.0, scale=20.0)
    inputs = [x.detach().requires_grad_(i == which) for i, x in enumerate(inputs)]
    found = []
    for budget in ("100", "0"):
        monkeypatch.setattr(sys.modules["himo_kernels.info_nce.api"], "_logits_mib", budget)
        losses = himo_loss(*inputs, backend="cpu")[:2]
        found.append((*losses, *gradients(losses, [inputs[which]])))
    with torch.no_grad():
        alone = himo_loss(*inputs, backend="cpu")[:2]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, found[0][:2], strict=True))


@needs_cpu
@pytest.mark.parametrize("name", ["images", "texts"])
def test_layouts_have_the_same_values(name, generator):
    inputs = sharing_a_direction(generator, 64, 128, offset=1.0, scale=20.0)
    expected = gradients(himo_loss(*inputs, backend="cpu")[:2], inputs)
    which = ("images", "texts").index(name)
    value = inputs[which].detach()
    for other in (value.t().contiguous().t(), torch._neg_view(value.neg())):
        given = [*inputs]
        given[which] = other.requires_grad_()
        actual = gradients(himo_loss(*given, backend="cpu")[:2], given)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)

"""himo_loss of few samples, whose losses share the products of images and centred texts."""

import pytest
import torch
import torch.nn.functional as F
from test_himo_loss import BACKENDS, composed, gradients, per_backend, per_switch

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
@pytest.mark.parametrize("samples", [32, 96])
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
    inputs = sharing_a_direction(generator, 48, 96, offset=1.0, scale=20.0)
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
def test_a_problem_has_the_same_bits_beside_others_and_on_any_number_of_threads(
    switches, generator
):
    shared = sharing_a_direction(generator, 40, 96, offset=1.0, scale=20.0)
    others = sharing_a_direction(generator, 40, 96, offset=0.0)
    few = hkt.power_law(40, 96, exponent=6.0, generator=generator)  # too few to share products
    texts = torch.stack([shared[1], few, others[1]]).detach().requires_grad_()
    images = torch.stack([shared[0], others[0], others[0]]).detach().requires_grad_()
    batch = (images, texts, shared[2])
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            losses = himo_loss(*batch, backend="cpu", **switches)[:2]
            grads = gradients(losses, batch)
        finally:
            torch.set_num_threads(threads)
        for b in range(3):
            own = [x[b].detach().requires_grad_() for x in batch[:2]]
            alone = himo_loss(*own, shared[2], backend="cpu", **switches)[:2]
            assert all(torch.equal(x[b], y) for x, y in zip(losses, alone, strict=True))
            for x, y in zip(grads[:2], gradients(alone, own), strict=True):
                assert torch.equal(x[b], y)

"""HiMoLoss.make_graphed: what it refuses and what it computes. Launches: test_launches.py."""

import pytest
import torch
from torch import Tensor

from himo_kernels.graphed import GraphedHiMoLoss, check_capture
from himo_kernels.nn import HiMoLoss
from himo_kernels.testing import power_law

SCALE = torch.tensor(20.0)


def batch(samples: int = 12, width: int = 16, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = [power_law(samples, width, generator=generator).to(device) for _ in range(2)]
    inputs = [x.requires_grad_() for x in (*features, SCALE.clone().to(device))]
    return inputs[0], inputs[1], inputs[2]


@pytest.mark.parametrize(
    ("settings", "samples", "width", "refusal"),
    [
        ({}, 12, 16, "expected image_features on a CUDA device, got 'cpu'"),
        ({"check_finite": True}, 12, 16, "expected check_finite to be False"),
        ({}, 129, 130, r"expected min\(N, D\) to be at most 128, .*, got 129"),
        ({}, 300, 128, "expected image_features on a CUDA device"),
    ],
)
def test_what_cannot_be_captured_is_refused(settings, samples, width, refusal):
    with pytest.raises(ValueError, match=f"^HiMoLoss.make_graphed: {refusal}"):
        HiMoLoss(**settings).make_graphed(*batch(samples, width))


def test_a_number_as_the_scale_is_refused():
    image, text, _ = batch()
    with pytest.raises(TypeError, match="expected logit_scale to be a torch.Tensor, got float"):
        HiMoLoss().make_graphed(image, text, 20.0)


def test_a_scale_on_another_device_is_refused():
    image, text, _ = batch()
    head = GraphedHiMoLoss(HiMoLoss(), HiMoLoss().terms, image)
    with pytest.raises(ValueError, match="expected logit_scale on cpu"):
        head(image, text, torch.tensor(1.0, device="meta"))


def test_wrong_features_are_refused_as_by_the_loss():
    image, text, scale = batch()
    with pytest.raises(ValueError, match="HiMoLoss: expected text_features of shape"):
        HiMoLoss().make_graphed(image, text[:5], scale)


def test_calls_are_those_of_the_loss():
    loss = HiMoLoss("official", component_weight=0.5)
    inputs = batch()
    head = GraphedHiMoLoss(loss, loss.terms, inputs[0])  # the terms without a graph
    expected = torch.autograd.grad(loss(*inputs), inputs)
    actual = torch.autograd.grad(head(*inputs), inputs)
    assert torch.equal(head(*inputs), loss(*inputs))
    assert all(map(torch.equal, actual, expected))
    for one, other in zip(head.terms(*inputs), loss.terms(*inputs), strict=True):
        assert torch.equal(one, other)


def test_backward_after_another_forward_is_refused():
    loss, inputs = HiMoLoss(), batch()
    head = GraphedHiMoLoss(loss, loss.terms, inputs[0])
    first, second = head(*inputs), head(*inputs)
    with pytest.raises(RuntimeError, match="backward before the next forward, got 1 since then"):
        first.backward()
    second.backward()
    assert torch.equal(second.detach(), loss(*inputs).detach())


def test_other_shapes_and_dtypes_than_captured_are_refused():
    image, text, scale = batch()
    head = GraphedHiMoLoss(HiMoLoss(), HiMoLoss().terms, image)
    assert head.fits(image) and not head.fits(image[:8])
    with pytest.raises(
        ValueError, match=r"expected image_features of shape \[12, 16\], got \[8, 16"
    ):
        head(image[:8], text[:8], scale)
    with pytest.raises(TypeError, match=r"expected text_features of torch.float32 on cpu, as"):
        head(image, text.double(), scale)
    with pytest.raises(TypeError, match="expected logit_scale to be a torch.Tensor, got float"):
        head(image, text, 20.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_graphs_replay_the_loss_on_new_values(preset):
    loss = HiMoLoss(preset, backend="triton")
    inputs = batch(128, 768, "cuda")
    head = loss.make_graphed(*inputs)
    for factor in (1.0, -0.5):
        for x in inputs:
            x.data.mul_(factor).add_(0.25)
        value, expected = head(*inputs), loss(*inputs)
        assert torch.equal(value, expected)
        gradients = torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs)
        assert all(map(torch.equal, *gradients))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_backend_is_refused_on_a_gpu():
    with pytest.raises(ValueError, match="expected backend to be 'triton'.*got 'reference'"):
        check_capture(HiMoLoss(backend="reference"), *batch(device="cuda"))

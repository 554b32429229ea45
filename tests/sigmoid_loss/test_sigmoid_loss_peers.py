"""The sigmoid losses of open_clip and transformers, values and all gradients, in one process.

tests/distributed/test_sigmoid_ranks.py compares open_clip's over several processes.
"""

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import assert_equal_to, losses_and_gradients
from sigmoid_cases import sigmoid_inputs
from torch import Tensor
from upstream import open_clip_loss

import himo_kernels
from himo_kernels.testing import relative_error, runnable_backends

BACKENDS = runnable_backends("sigmoid_loss", interpreted=False)
per_backend = pytest.mark.parametrize("backend", BACKENDS)
SETTINGS = [(10.0, -10.0), (117.3, -12.9), (100.0, -100.0), (1.0, 4.0)]


@per_backend
@pytest.mark.parametrize("scale, bias", SETTINGS)
@pytest.mark.skipif(open_clip_loss() is None, reason="open_clip is not installed")
def test_open_clip(backend, scale, bias, generator):
    loss = open_clip_loss().SigLipLoss()

    def ours(**inputs: Tensor) -> tuple[Tensor]:
        return (himo_kernels.sigmoid_loss(**inputs, backend=backend),)

    def theirs(**inputs: Tensor) -> tuple[Tensor]:
        return (loss(*inputs.values()),)

    for shape in ((1, 4), (37, 12)):
        inputs = sigmoid_inputs(*shape, scale=scale, bias=bias, generator=generator)
        results = (losses_and_gradients(function, inputs) for function in (ours, theirs))
        assert_equal_to(*results, 1e-12)


@pytest.fixture(scope="module")
def siglip():
    """A small SiglipModel of transformers with random weights, in float64."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    text = sizes | heads | {"vocab_size": 40, "max_position_embeddings": 8}
    vision = sizes | heads | {"image_size": 8, "patch_size": 4}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return transformers.SiglipModel(config).double().eval()


@per_backend
@pytest.mark.parametrize("scale, bias", SETTINGS)
def test_transformers(siglip, backend, scale, bias, generator):
    # Its loss is inside the model's forward, so the gradients are those of its parameters.
    with torch.no_grad():
        siglip.logit_scale.fill_(torch.tensor(scale, dtype=torch.float64).log())
        siglip.logit_bias.fill_(bias)
    outputs = siglip(
        input_ids=torch.randint(40, (9, 8), generator=generator),
        pixel_values=torch.randn(9, 3, 8, 8, dtype=torch.float64, generator=generator),
        return_loss=True,
    )
    loss = himo_kernels.sigmoid_loss(
        outputs.image_embeds,
        outputs.text_embeds,
        siglip.logit_scale.exp(),
        siglip.logit_bias,
        backend=backend,
    )
    assert relative_error(loss, outputs.loss) <= 1e-12
    assert torch.allclose(outputs.image_embeds, F.normalize(outputs.image_embeds, dim=-1))
    parameters = dict(siglip.named_parameters())
    found, expected = (
        torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        for value in (loss, outputs.loss)
    )
    largest = max(gradient.norm() for gradient in expected if gradient is not None)
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:  # some, as of keys' biases, are 0 but for rounding
            assert relative_error(ours, theirs, 1e-3 * largest) <= 1e-12, name

"""GradCache in one process: micro-batches give the gradient of the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import himo
from himo.accumulate import cached_backward
from himo.config import TrainConfig
from himo.model import CONFIGS, HiMoCLIP
from himo.objective import Objective
from himo_kernels.nn import HiMoLoss
from himo_kernels.testing import relative_error


def gradient(module: nn.Module) -> torch.Tensor:
    return parameters_to_vector([p.grad for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("lock", ["none", "image", "text"])
def test_four_batches_contrast_as_one(lock, dtype, limit, generator):
    torch.manual_seed(generator.initial_seed())
    model = HiMoCLIP(CONFIGS["tiny"])
    if lock != "none":
        getattr(model, f"lock_{lock}_tower")()
    objective = Objective(model, TrainConfig(train_data="x"))
    if dtype == torch.float64:
        objective.towers = Wide(model.double())
    images = torch.randint(0, 255, (16, 3, 64, 64), dtype=torch.uint8, generator=generator)
    tokens = himo.tokenize([f"a card with number {number**3}" for number in range(16)])
    whole = objective.backward(images, tokens, 16, 16)
    expected = gradient(model)
    model.zero_grad()
    parts = objective.backward(images, tokens, 16, 4)
    torch.testing.assert_close(parts["loss"], whole["loss"], rtol=limit, atol=0)
    assert relative_error(gradient(model), expected) <= limit


class Wide(nn.Module):
    """Towers of the trainer without their cast to float32."""

    def __init__(self, model: HiMoCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, images, tokens, max_length, lengths=None):
        features = self.model.encode_image(images.double() / 255 - 0.5)
        texts = self.model.encode_text(tokens, max_length, lengths=lengths)
        return features, texts, self.model.logit_scale.exp()


class Dropping(nn.Module):
    """Towers whose every forward draws a dropout mask."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([nn.Linear(6, 8, dtype=torch.float64) for _ in range(2)])
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, images, texts):
        features = [t(x) for t, x in zip(self.towers, (images, texts), strict=True)]
        return *(nn.functional.dropout(f, 0.3) for f in features), self.log_scale.exp()


def test_random_state_is_replayed_and_then_goes_on(generator):
    images, texts = torch.randn(2, 9, 6, dtype=torch.float64, generator=generator)
    parts = list(zip(images.split(4), texts.split(4), strict=True))  # 4, 4 and 1 rows
    towers, loss = Dropping(), HiMoLoss()
    torch.manual_seed(3)
    embeddings = [towers(*part) for part in parts]
    loss(
        *(torch.cat(column) for column in list(zip(*embeddings, strict=True))[:2]), embeddings[0][2]
    ).backward()
    after, expected = torch.get_rng_state(), gradient(towers)
    towers.zero_grad()
    torch.manual_seed(3)
    cached_backward(towers, lambda *features: {"loss": loss(*features)}, parts)
    assert relative_error(gradient(towers), expected) <= 1e-12
    assert torch.equal(torch.get_rng_state(), after)

"""open_clip's published trainer: train_one_epoch of its train.py, with this library's losses.

The package needs torchvision, which cannot be imported with a CPU build of torch. So train.py is
loaded by its path, with stubs for its imports from open_clip: get_input_dtype and get_autocast as
for precision "fp32", is_master for one process, and names that these runs do not use (CLIP,
CustomTextCLIP, zero_shot_eval).
"""

import contextlib
import copy
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upstream import Towers, module_of, open_clip_loss

import himo_kernels
from himo_kernels import testing as hkt
from himo_kernels.nn import HiMoLoss

upstream = open_clip_loss()
found = importlib.util.find_spec("open_clip_train")
pytestmark = pytest.mark.skipif(
    upstream is None or found is None or found.origin is None,
    reason="open_clip_torch with its trainer is not installed (pip install --no-deps)",
)
WIDTH, FEATURES, ROWS, STEPS = 24, 16, 32, 20
SUPPLIED = {
    "open_clip": {"get_input_dtype": lambda precision: None, "CLIP": None, "CustomTextCLIP": None},
    "open_clip_train": {},
    "open_clip_train.distributed": {"is_master": lambda args: True},
    "open_clip_train.zero_shot": {"zero_shot_eval": None},
    "open_clip_train.precision": {
        "get_autocast": lambda precision, device_type: contextlib.nullcontext
    },
}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name, names in SUPPLIED.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    return module_of("open_clip_train.train", Path(found.origin).parent / "train.py")


def batches(generator: torch.Generator, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    drawn = []
    for _ in range(STEPS):
        image = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
        noise = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
        drawn.append((image.to(dtype), (image + noise).to(dtype)))
    return drawn


class Loader(list):
    num_batches, num_samples = STEPS, STEPS * ROWS


def trained(train, model: nn.Module, loss: nn.Module, data, accum_freq: int = 1) -> nn.Module:
    """A copy of the model after an epoch of open_clip's trainer, with open_clip's optimiser."""
    model = copy.deepcopy(model)
    args = SimpleNamespace(
        device="cpu", precision="fp32", accum_freq=accum_freq, distill=False, skip_scheduler=True,
        horovod=False, grad_clip_norm=1.0, log_every_n_steps=5, world_size=1, batch_size=ROWS,
        wandb=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    epoch = SimpleNamespace(dataloader=Loader(data), set_epoch=lambda epoch: None)
    train.train_one_epoch(model, {"train": epoch}, loss, 0, optimizer, None, None, None, args)
    return model


def farthest(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


class Unbiased(Towers):
    """CLIP has no bias: its gradient would be pure rounding, and Adam would divide by it."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features)
        del self.logit_bias
        self.logit_bias = None

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        out = super().forward(image, text)
        out.pop("logit_bias")
        return out


@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_an_accelerated_loss_trains_the_same_model(train, accum_freq, dtype, bound, generator):
    model, data = Unbiased(WIDTH, FEATURES).to(dtype), batches(generator, dtype)
    expected = trained(train, model, upstream.ClipLoss(), data, accum_freq)
    loss = upstream.ClipLoss()
    himo_kernels.accelerate(loss)
    found = trained(train, model, loss, data, accum_freq)
    assert farthest(expected, model) > 1e-3
    assert farthest(found, expected) <= bound


class Equation4(nn.Module):
    """The loss of HiMo-CLIP with F.cross_entropy and an SVD, for the same trainer."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict):
        components, _ = hkt.oracle_pca_reconstruct(text_features, 0.9)
        keys = (text_features, F.normalize(components, dim=-1))
        contrastive, component = (hkt.oracle_info_nce(image_features, k, logit_scale) for k in keys)
        return {"the loss": contrastive + self.weight * component + 0 * logit_bias}


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
def test_himo_loss_trains_equation_4(train, weight, generator, caplog):
    model, data = Towers(WIDTH, FEATURES).double(), batches(generator, torch.float64)
    expected = trained(train, model, Equation4(weight), data)
    with caplog.at_level(logging.INFO):
        found = trained(train, model, HiMoLoss(component_weight=weight, gap_eps=0.0), data)
    assert farthest(expected, model) > 1e-3
    assert farthest(found, expected) <= 1e-8
    assert "Contrastive_loss: " in caplog.text and "Component_loss: " in caplog.text

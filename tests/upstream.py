"""Other people's code that is accelerated: open_clip's own loss, the released model's interface."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import released

NAME = "open_clip.loss"


def open_clip_loss() -> ModuleType | None:
    """open_clip's loss.py, or None where open_clip is not installed.

    That file alone: the package imports torchvision, which cannot be imported beside a CPU's torch.
    """
    if NAME not in sys.modules:
        package = importlib.util.find_spec("open_clip")
        if package is None or package.origin is None:
            return None
        spec = importlib.util.spec_from_file_location(NAME, Path(package.origin).parent / "loss.py")
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


class ReleasedCLIP(nn.Module):
    """The interface and the loss of the released HiMo-CLIP model, on towers of one matrix each."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.image_tower = nn.Linear(width, features, bias=False)
        self.text_tower = nn.Linear(width, features, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.image_tower(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.text_tower(text)

    def cumratio_PCA(self, input_tensor: Tensor, ratio: float = 0.85) -> Tensor:
        return released.cumulative_ratio_pca(input_tensor, ratio)

    def forward(
        self, image: Tensor, text_long: Tensor, rank: int, pca_ratio: float = 0.85
    ) -> tuple[Tensor, Tensor]:
        image_features, text_features = self.encode_image(image), self.encode_text(text_long)
        return released.himo_loss(
            image_features, text_features, self.logit_scale.exp(), ratio=pca_ratio
        )


class Towers(nn.Module):
    """What open_clip's trainer gives a ClipLoss: normalised features of two matrices, and exp."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.image_tower = nn.Linear(width, features, bias=False)
        self.text_tower = nn.Linear(width, features, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image_tower(image), dim=-1),
            "text_features": F.normalize(self.text_tower(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }

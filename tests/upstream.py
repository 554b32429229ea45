"""Third-party code to accelerate: open_clip's losses, the interface of the released model."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import released

NAME = "open_clip.loss"
# `make setup` installs the oldest version here; as a package it would shadow the newest.
OLDEST = Path(sys.prefix) / "open_clip_oldest" / "open_clip" / "loss.py"


def module_of(name: str, path: Path) -> ModuleType:
    """The file as a module of this name, imported without its package."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip_loss() -> ModuleType | None:
    """open_clip's loss.py, or None if open_clip is not installed.

    Only that file: the package imports torchvision, which a CPU build of torch cannot import.
    """
    if NAME not in sys.modules:
        package = importlib.util.find_spec("open_clip")
        if package is None or package.origin is None:
            return None
        sys.modules[NAME] = module_of(NAME, Path(package.origin).parent / "loss.py")
    return sys.modules[NAME]


def oldest_open_clip_loss() -> ModuleType | None:
    """The loss.py of open_clip_torch 0.2.0, or None if `make setup` has not installed it."""
    return module_of(NAME, OLDEST) if OLDEST.exists() else None


class UnpublishedClipLoss(nn.Module):
    """ClipLoss with the interface of open_clip's repository after 3.3.0: no use_horovod."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        return torch.arange(num_logits, device=device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        logits = logit_scale * image_features @ text_features.T
        logits = logits if logit_bias is None else logits + logit_bias
        return logits, logits.T

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = self.get_ground_truth(image_features.device, len(image_features))
        loss = sum(F.cross_entropy(rows, labels) for rows in logits) / 2
        return {"contrastive_loss": loss} if output_dict else loss


# accelerate recognises it by its name and module.
UnpublishedClipLoss.__name__, UnpublishedClipLoss.__module__ = "ClipLoss", NAME


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
    """As open_clip's trainer calls a ClipLoss: normalised features of two matrices, and exp."""

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

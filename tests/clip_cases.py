"""Small models and inputs shared by the tests of the model, of checkpoints and of bad input."""

import torch
from torch import Tensor

from himo.model import CLIPConfig, HiMoCLIP

# Widths of one head (vision) and two heads (text), so that a wrong split into heads fails.
SMALL = CLIPConfig(
    embed_dim=48,
    image_resolution=32,
    vision_layers=2,
    vision_width=64,
    vision_patch_size=8,
    context_length=248,
    vocab_size=500,
    text_width=128,
    text_layers=3,
)
# The smallest CLIP that still uses both tables of text positions.
TINIEST = CLIPConfig(
    embed_dim=8,
    image_resolution=8,
    vision_layers=1,
    vision_width=8,
    vision_patch_size=4,
    context_length=24,
    vocab_size=16,
    text_width=8,
    text_layers=1,
)


def random_model(config: CLIPConfig, generator: torch.Generator) -> HiMoCLIP:
    """A model without values 0 and 1, so that a swapped or missing tensor shows."""
    model = HiMoCLIP(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 * parameter + 0.05 * noise + 0.01)
    return model


def random_image(config: CLIPConfig, count: int, generator: torch.Generator) -> Tensor:
    size = config.image_resolution
    return torch.randn(count, 3, size, size, generator=generator)


def tokens_of_lengths(
    config: CLIPConfig, lengths: list[int], generator: torch.Generator, width: int | None = None
) -> Tensor:
    """int64 [len(lengths), width]: texts of these lengths, end token included, then zeros."""
    tokens = torch.zeros(len(lengths), width or config.context_length, dtype=torch.int64)
    for row, length in enumerate(lengths):
        words = torch.randint(1, config.vocab_size - 2, (length,), generator=generator)
        tokens[row, :length] = words
        tokens[row, length - 1] = config.vocab_size - 1
    return tokens

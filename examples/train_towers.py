"""Trains two small towers with HiMoLoss on pairs that share a hidden cause.

python examples/train_towers.py
"""

import torch
from torch import nn

import himo_kernels as hk

BATCH, CAUSES, INPUTS, FEATURES, STEPS = 64, 12, 40, 32, 60


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 64), nn.GELU(), nn.Linear(64, FEATURES))


def main() -> None:
    torch.manual_seed(0)
    images, texts = tower(), tower()
    log_scale = nn.Parameter(torch.tensor(10.0).log())  # CLIP learns the logarithm
    criterion = hk.nn.HiMoLoss()
    parameters = [*images.parameters(), *texts.parameters(), log_scale]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3)
    to_image, to_text = torch.randn(2, CAUSES, INPUTS)  # how a cause looks in each modality

    for step in range(STEPS):
        cause = torch.randn(BATCH, CAUSES)
        image_features, text_features = images(cause @ to_image), texts(cause @ to_text)
        loss = criterion(image_features, text_features, log_scale.exp())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == STEPS - 1:
            with torch.no_grad():
                terms = criterion.terms(image_features, text_features, log_scale.exp())
            print(
                f"step {step:2}: contrastive {terms.contrastive_loss:.3f}, "
                f"component {terms.component_loss:.3f}, rank {int(terms.rank)}"
            )


if __name__ == "__main__":
    main()

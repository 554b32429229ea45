"""How many components HiDe keeps, for three kinds of batches and three thresholds tau.

python examples/what_hide_keeps.py
"""

import torch

import himo_kernels as hk
from himo_kernels.testing import label_captions, power_law

SAMPLES, FEATURES = 128, 64


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = {
        "unrelated texts": torch.randn(SAMPLES, FEATURES, generator=generator),
        "a few topics": power_law(SAMPLES, FEATURES, generator=generator),
        "ten class names": label_captions(SAMPLES, FEATURES, 10, generator=generator),
    }
    print(f"{'rank at tau':20}   0.5   0.9  0.99")
    for name, batch in batches.items():
        texts = hk.normalize(batch)
        ranks = [int(hk.pca_reconstruct(texts, tau)[1]) for tau in (0.5, 0.9, 0.99)]
        print(f"{name:20} " + " ".join(f"{rank:5}" for rank in ranks))


if __name__ == "__main__":
    main()

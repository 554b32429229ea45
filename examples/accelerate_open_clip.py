"""open_clip's ClipLoss with these operators: the same values and gradients, and back again.

python examples/accelerate_open_clip.py
"""

import torch
from open_clip.loss import ClipLoss
from torch import Tensor

import himo_kernels as hk


def gradients(loss: ClipLoss, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    inputs = [value.clone().requires_grad_() for value in (image, text, scale)]
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = hk.normalize(torch.randn(2, 256, 64, generator=generator))
    scale = torch.tensor(100.0)
    loss = ClipLoss()
    plain = gradients(loss, image, text, scale)

    accelerated = hk.accelerate(loss)
    for name, ours, theirs in zip(
        ("loss", "d image", "d text", "d scale"),
        gradients(loss, image, text, scale),
        plain,
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        print(f"{name:8} differs by at most {(ours - theirs).abs().max():.1e}")

    accelerated.undo()
    assert all(a.equal(b) for a, b in zip(gradients(loss, image, text, scale), plain, strict=True))
    print("after undo() the loss is open_clip's again")


if __name__ == "__main__":
    main()

"""Runs the Triton kernels of the main operators once on small inputs, for compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.small
"""

import argparse
import sys

import torch

import himo_kernels as hk
from himo_kernels.dispatch import OPERATORS
from himo_kernels.testing import power_law

SAMPLES, FEATURES = 40, 96  # several tiles, the last of which are ragged


def main(arguments: list[str] | None = None) -> int:
    """Runs every operator forward and backward; returns 1 if a result is not finite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := OPERATORS["info_nce"].why_not("triton", torch.empty(1, device=device)):
        parser.error(reason)
    status = 0
    for dtype in options.dtype:
        inputs = [
            power_law(SAMPLES, FEATURES, dtype=getattr(torch, dtype), device=device)
            for _ in range(2)
        ]
        image, text = (x.requires_grad_() for x in inputs)
        scale = torch.tensor(10.0, device=device, requires_grad=True)
        labels = torch.arange(SAMPLES, device=device) // 2
        losses = {
            "himo_loss": hk.nn.HiMoLoss(backend="triton")(image, text, scale),
            "info_nce, labels": hk.info_nce(image, text, scale, labels=labels, backend="triton"),
            "sigmoid_loss": hk.sigmoid_loss(image, text, scale, -10.0, backend="triton"),
            "covariance": hk.covariance(text, backend="triton")[1].square().sum(),
        }
        for name, loss in losses.items():
            finite = [g.isfinite().all() for g in torch.autograd.grad(loss, [text])]
            finite.append(loss.isfinite())
            good = bool(torch.stack(finite).all())
            print(f"{name}, {dtype}: {'finite' if good else 'NOT FINITE'}", flush=True)
            status |= not good
    return status


if __name__ == "__main__":
    sys.exit(main())

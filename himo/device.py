"""Checks the device that the user names."""

import torch

from himo.errors import HimoError


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name; for "auto" a GPU where there is one, else the CPU.

    Raises:
        HimoError: this machine has no such device, or it stores no values ("meta").
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target).cpu()  # which "meta" refuses
    except (AssertionError, RuntimeError, TypeError) as error:  # AssertionError: no CUDA in torch
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise HimoError(f"the device {str(device)!r} cannot be used: {reason}") from error
    return target

"""GradCache: the exact gradient of a batch whose activations do not fit, by micro-batches.

Gao et al., arXiv 2101.06983. First the embeddings of all micro-batches are computed without a
graph. The loss of the whole batch gives their gradients. Then each micro-batch runs again with a
graph and propagates its part. Costs one more forward, and the memory of one micro-batch.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def cached_backward(
    encode: nn.Module,
    losses: Callable[..., dict[str, Any]],
    parts: Sequence[tuple[Any, ...]],
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Any]:
    """Adds the gradient of losses(*embeddings)["loss"] to the parameters; returns the losses.

    Args:
        encode: returns the embeddings [B, *] of a micro-batch, then the logit scale [], which all
            micro-batches share. DDP averages its gradients once, after the last micro-batch; FSDP
            after each, so that no rank holds the whole gradient.
        losses: takes the embeddings of all micro-batches, concatenated along their rows.
        parts: the arguments of encode for each micro-batch; at least one.
        scaled: maps the loss to the one whose gradient is added, such as `GradScaler.scale`.
    """
    cached: list[tuple[Tensor, ...]] = []
    states = []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(part))
            cached.append(encode(*part))
    *columns, scales = zip(*cached, strict=True)
    leaves = [tensor.requires_grad_() for tensor in (*map(torch.cat, columns), scales[0])]
    outputs = losses(*leaves)
    scaled(outputs["loss"]).backward()
    rows = [part[0].shape[0] for part in cached]
    grads = [leaf.grad.split(rows) for leaf in leaves[:-1] if leaf.grad is not None]
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        last = number + 1 == len(parts)
        with torch.random.fork_rng(devices=list(state[1])):
            _set_random_state(state)
            waits = isinstance(encode, DistributedDataParallel) and not last
            with encode.no_sync() if waits else nullcontext():  # type: ignore[operator]
                embeddings = encode(*part)
                pairs = [(e, g[number]) for e, g in zip(embeddings, grads, strict=False)]
                if last:  # the scale is shared: its gradient is added once
                    pairs.append((embeddings[-1], leaves[-1].grad))
                pairs = [(e, g) for e, g in pairs if e.requires_grad]
                torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
    return outputs


def _random_state(part: Sequence[Any]) -> tuple[Tensor, dict[int, Tensor]]:
    # The states of the generators that a forward on these tensors may draw from.
    devices = {t.device.index or 0 for t in part if isinstance(t, Tensor) and t.is_cuda}
    return torch.get_rng_state(), {index: torch.cuda.get_rng_state(index) for index in devices}


def _set_random_state(state: tuple[Tensor, dict[int, Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for index, value in state[1].items():
        torch.cuda.set_rng_state(value, index)

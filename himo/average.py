"""--ema: an exponential moving average of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from himo import sharding


class AverageWeights:
    """a <- decay * a + (1 - decay) * w after each step, for every weight w that is trained.

    The average begins with the weights that the model has now. Frozen weights have no average: it
    would be the weight.

    Args:
        model: its parameters keep their identity, as an optimizer needs.
        decay: from 0, which is the weights themselves, to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of one more step into the average."""
        averages, weights = (
            [sharding.local(tensor) for tensor in tensors.values()]
            for tensors in (self._averages, self._weights)
        )
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the body the weights of the model are the average. The body must not train it.

        Not for sharded weights: FSDP keeps references to their memory.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._weights.items():
            weight.data, self._averages[name] = self._averages[name], weight.data

    def state_dict(self) -> dict[str, Tensor]:
        """The average of each weight, by its name."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies whole averages of `state_dict`. An average that is missing begins now.

        Raises:
            ValueError: an average and its weight have different shapes.
        """
        for name, average in self._averages.items():
            value = self._weights[name].detach()
            if name in state:
                if state[name].shape != sharding.whole_shape(name, average):
                    raise ValueError(f"the average of {name} is of another shape")
                value = sharding.part(state[name], average)
            average.copy_(value)

"""metrics.jsonl: what a run measures while it trains, a line at a time."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import himo_kernels
from himo.errors import HimoError
from himo.files import atomic_path
from himo.parallel import Ranks
from himo.validation import COLUMNS as VALIDATION_COLUMNS
from himo_kernels import distributed

_LOSSES = ("loss", "contrastive_loss", "component_loss")
_SPECTRUM = 256  # eigenvalues of a spectrum that are recorded


class Metrics:
    """Writes a line each log_every_n_steps, of means since the last one.

    Values stay on the device until a line is written: the loop does not wait for them. Losses are
    means over ranks; every rank calls `write`, and one writes.

    Args:
        path: of the file.
        pairs_per_step: in the batch of all ranks.
        ranks: the processes of the run.
    """

    def __init__(self, path: Path, pairs_per_step: int = 0, ranks: Ranks | None = None) -> None:
        self.path, self.pairs_per_step = path, pairs_per_step
        self.ranks = ranks or Ranks()
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._data_s = self._step_s = 0.0
        self._spectrum_epoch = -1

    def add(self, loss: Tensor, grad_norm: Tensor, data_time_s: float, step_time_s: float) -> None:
        """Counts one step."""
        self._pending.append((loss.detach(), grad_norm.detach()))
        self._data_s += data_time_s
        self._step_s += step_time_s

    def check_finite(self, step: int) -> None:
        """Raises HimoError if a loss or gradient since the last line is NaN or infinite."""
        for back, values in enumerate(reversed(self._pending)):
            for name, value in zip(("loss", "gradient"), values, strict=True):
                if not torch.isfinite(value):
                    raise HimoError(
                        f"step {step - back}: the {name} is {value.item()}; nothing was saved "
                        "since. A smaller --lr or --grad-clip-norm 1 may help"
                    )

    def write(
        self, step: int, epoch: float, lr: float, logit_scale: Tensor, outputs: dict[str, Any]
    ) -> dict[str, Any]:
        """Appends a line and returns it; HimoError where a value is not finite."""
        self.check_finite(step)
        steps = len(self._pending)

        names = [name for name in _LOSSES if outputs[name] is not None]
        means = self.ranks.mean(torch.stack([outputs[name].detach() for name in names]))
        losses = dict.fromkeys(_LOSSES) | dict(zip(names, means.tolist(), strict=True))

        line: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "samples": step * self.pairs_per_step,
            **losses,
            "logit_scale": float(logit_scale.detach().exp()),
            "lr": lr,
            "grad_norm": float(self._pending[-1][1]),
            "rank": None if outputs["rank"] is None else int(outputs["rank"]),
            "data_time_s": self._data_s / steps,
            "step_time_s": self._step_s / steps,
            "samples_per_s": steps * self.pairs_per_step / self._step_s,
            **{name: outputs[name] for name in VALIDATION_COLUMNS if name in outputs},
        }
        if int(epoch) != self._spectrum_epoch:  # once an epoch: it costs an eigenproblem
            self._spectrum_epoch = int(epoch)
            texts = distributed.all_gather(outputs["text_features"], differentiate=False)
            texts = F.normalize(texts, dim=-1)
            ratio = himo_kernels.pca(texts).explained_variance_ratio
            line["spectrum"] = [round(float(share), 6) for share in ratio[:_SPECTRUM]]
        self._pending.clear()
        self._data_s = self._step_s = 0.0
        if not self.ranks.main:
            return line
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise HimoError(f"{self.path}: cannot be written: {error.strerror}") from error
        return line

    def rewind(self, step: int) -> None:
        """Drops the lines past a step: those of a run that is resumed from there."""
        if not self.path.exists():
            return
        kept = []
        for text in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if text.endswith("\n") and json.loads(text)["step"] <= step:
                    kept.append(text)
            except (ValueError, KeyError, TypeError):
                continue  # cut off when the run was killed
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

"""metrics.jsonl: the measurements of a run, one line at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import himo_kernels
from himo.errors import HimoError
from himo.files import atomic_path, json_value, open_regular
from himo.parallel import Ranks
from himo.validation import COLUMNS as VALIDATION_COLUMNS
from himo_kernels import distributed

_LOSSES = ("loss", "contrastive_loss", "component_loss")
_SPECTRUM = 256  # recorded eigenvalues of a spectrum
_LAST_STEP = 1 << 53  # a double represents every smaller integer
_LONGEST = 1 << 20  # bytes of a line; one with a spectrum takes 3,000
_SKIPS_IN_A_ROW = 10  # so many steps without a finite gradient end a run: it will not recover


class TrainingLog:
    """Writes a line every log_every_n_steps, with mean times since the last one.

    Values stay on the device until a line is written, so the loop does not sync. Losses are means
    over ranks; every rank calls `write`, and rank 0 writes.

    Args:
        path: of the file.
        pairs_per_step: pairs in the batch of all ranks.
        ranks: the processes of the run.
    """

    def __init__(self, path: Path, pairs_per_step: int = 0, ranks: Ranks | None = None) -> None:
        self.path, self.pairs_per_step = path, pairs_per_step
        self.ranks = ranks or Ranks()
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._data_s = self._step_s = 0.0
        self._skipped = self._skipped_in_a_row = 0
        self._spectrum_epoch = -1
        self.recipe: dict[str, Any] | None = None  # its choices, for the first line

    def add_time(self, data_time_s: float, step_time_s: float) -> None:
        """Adds the time of one step, and the part of it spent waiting for data."""
        self._data_s += data_time_s
        self._step_s += step_time_s

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Counts one step."""
        self._pending.append((loss.detach(), grad_norm.detach()))
        self._skipped_in_a_row = 0

    def skip(self, step: int, grad_norm: Tensor) -> None:
        """Counts one step that changed no weight; HimoError after too many in a row."""
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == _SKIPS_IN_A_ROW:
            raise HimoError(
                f"step {step}: the gradient is {grad_norm.item()}, as in the {_SKIPS_IN_A_ROW - 1} "
                "steps before. A smaller --lr or --grad-clip-norm 1 may help"
            )
        if self.ranks.main:
            tqdm.write(f"step {step}: skipped, the gradient is {grad_norm.item()}")

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
        """Appends a line and returns it; HimoError if a value is not finite."""
        self.check_finite(step)
        steps = len(self._pending) + self._skipped
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
            "samples_per_s": per_second(steps * self.pairs_per_step, self._step_s),
            "skipped_steps": self._skipped,
            **{name: outputs[name] for name in VALIDATION_COLUMNS if name in outputs},
        }
        if "predictions" in outputs:
            line["predictions"] = outputs["predictions"]
        if int(epoch) != self._spectrum_epoch:  # once an epoch, for it needs an eigendecomposition
            self._spectrum_epoch = int(epoch)
            texts = distributed.all_gather(outputs["text_features"], differentiate=False)
            texts = F.normalize(texts, dim=-1)
            ratio = himo_kernels.pca(texts).explained_variance_ratio
            line["spectrum"] = [round(float(share), 6) for share in ratio[:_SPECTRUM]]
        if self.recipe is not None:
            line["recipe"], self.recipe = self.recipe, None
        self._pending.clear()
        self._data_s = self._step_s = 0.0
        self._skipped = 0
        if not self.ranks.main:
            return line
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise HimoError(f"{self.path}: cannot be written: {error.strerror}") from error
        return line

    def resumed(self, step: int, changes: dict[str, Any]) -> int:
        """Cuts the file to a step; returns how many lines could not be read.

        Drops later lines, which the run will write again, and unreadable ones. Adds a line with
        the changes and the number of unreadable lines, if there are any.

        Args:
            step: of the checkpoint.
            changes: [before, now] of each setting that differs, by name.
        """
        if not (changes or self.path.exists()):
            return 0
        unreadable = 0
        with atomic_path(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for line in self._lines():
                if line is None:
                    unreadable += 1
                elif line["step"] <= step:
                    file.write(json.dumps(line) + "\n")
            if changes or unreadable:
                what = {"changes": changes, "unreadable_lines": unreadable}
                file.write(json.dumps({"step": step, "resumed": what}) + "\n")
        return unreadable

    def _lines(self) -> Iterator[dict[str, Any] | None]:
        if self.path.exists():
            with open_regular(self.path) as file:
                yield from read_lines(file)


def read_lines(file: BinaryIO) -> Iterator[dict[str, Any] | None]:
    """Yields the object in each line of a metrics.jsonl; None if the line cannot be read.

    A killed process leaves a line that is cut off, a power cut leaves a block of NULs, a failing
    disk leaves anything. A line is an object with a number `step`.
    """
    while raw := file.readline(_LONGEST):
        is_whole = raw.endswith(b"\n") or len(raw) < _LONGEST
        while not is_whole:
            rest = file.readline(_LONGEST)
            is_whole = rest.endswith(b"\n") or not rest
            raw = b"(too long)"
        if raw.strip():
            yield _parsed(raw.strip(b"\0 \t\r\n"))


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json_value(text)
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    if isinstance(step, bool) or not isinstance(step, int | float):
        return None
    return line if abs(step) <= _LAST_STEP else None  # false for NaN


def per_second(count: float, seconds: float) -> float | None:
    """A rate; None if no time has passed, because a clock may read the same twice."""
    return count / seconds if seconds > 0 else None

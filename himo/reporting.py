"""--report-to: the lines of metrics.jsonl, also for TensorBoard and Weights & Biases."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

from himo.config import TrainConfig
from himo.errors import HimoError

Write = Callable[[int, dict[str, float]], None]


class Reports:
    """Writes the numbers of each line where --report-to says, until it is closed.

    A package is imported only when it is named. TensorBoard's files are in the folder of the run. A
    resumed run is another run of W&B in the same group, because W&B takes no step twice.

    Args:
        settings: of the run.
        step: steps done before.

    Raises:
        HimoError: as `check_installed`, or W&B does not begin a run.
    """

    def __init__(self, settings: TrainConfig, step: int = 0) -> None:
        check_installed(settings)
        self._writers: list[tuple[Write, Callable[[], None]]] = []
        try:
            for name in settings.reports:
                self._writers.append(_OPENERS[name](settings, step))
        except BaseException:
            self.close()
            raise

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line of metrics.jsonl, without its spectrum."""
        numbers = {n: v for n, v in line.items() if n != "step" and isinstance(v, int | float)}
        for write, _ in self._writers:
            write(line["step"], numbers)

    def close(self) -> None:
        """Writes the values still in memory, and closes the reports."""
        for _, close in self._writers:
            close()


def check_installed(settings: TrainConfig) -> None:
    """HimoError for a package that --report-to names and that is not installed."""
    for name in settings.reports:
        if importlib.util.find_spec(name) is None:
            raise HimoError(f"--report-to {name}: is not installed: pip install {name}")


def _tensorboard(settings: TrainConfig, step: int) -> tuple[Write, Callable[[], None]]:
    # By name: its types are of a package that may be absent.
    module = importlib.import_module("torch.utils.tensorboard")
    purge = step + 1 if step else None  # hides lines that a killed run wrote after its checkpoint
    writer = module.SummaryWriter(str(settings.folder / "tensorboard"), purge_step=purge)

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(settings: TrainConfig, step: int) -> tuple[Write, Callable[[], None]]:
    wandb = importlib.import_module("wandb")
    try:
        run = wandb.init(
            project="himo",
            name=settings.run_name,
            group=settings.run_name,
            dir=str(settings.folder),
            config=dataclasses.asdict(settings),
        )
    except wandb.Error as error:  # without an account, or without its server
        advice = "WANDB_MODE=offline writes to the run's folder"
        raise HimoError(f"--report-to wandb: {error}; {advice}") from error
    return lambda step, numbers: run.log(numbers, step=step), run.finish


_OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb}

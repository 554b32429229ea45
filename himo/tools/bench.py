"""`himo bench data`: how fast images and captions are read, step by step and all together.

`himo bench kernels` runs benchmarks/report.py, which is in the source tree alone.
"""

import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from himo import config, recipes
from himo.config import TrainConfig
from himo.data import BatchLoader, CaptionedImages, EpochSampler, Sample, worker_deaths
from himo.errors import HimoError
from himo.model import named_config
from himo.parallel import Ranks
from himo.progress import passing_bar
from himo.training_data import open_data, training_loader, training_pairs
from himo.training_log import per_second
from himo.transforms import ImageError

# The flags of `himo train` that decide how its data are read.
_FLAGS = (
    *("train_data", "dataset_type", "image_root", "csv_separator", "csv_img_key"),
    *("csv_caption_key", "skip_missing_images", "follow_links", "short_captions"),
    *(
        "max_bad_fraction",
        "image_mode",
        "workers",
        "token_cache",
        "model",
        "batch_size",
        "seed",
        "threads",
    ),
)
_MAX_SECONDS = 3600.0
_MAX_BATCHES = 10_000  # of the loader, in addition to the seconds: enough for any rate


@dataclasses.dataclass(frozen=True)
class Rate:
    """The samples and the seconds of a step of reading."""

    step: str
    samples: int
    seconds: float

    @property
    def per_second(self) -> float | None:
        return per_second(self.samples, self.seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to measure: the data, with the trainer's flags for it, or the kernels."""
    parts = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    data = parts.add_parser("data", help="the reading of the training data")
    data.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="for each part (default: 5)"
    )
    config.add_arguments(data, _FLAGS)
    kernels = parts.add_parser("kernels", help="the kernels against PyTorch, as one HTML page")
    # The flags of benchmarks.report, which checks them.
    kernels.add_argument("--out", required=True, metavar="DIR", help="report.html and rows")
    kernels.add_argument("--baseline", metavar="DIR", help="an earlier run to compare with")
    kernels.add_argument("--minutes", help="of measuring; default 5")
    kernels.add_argument("--threads", help="of the CPU; torch's own number by default")
    kernels.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu")
    kernels.add_argument(
        "--fail-on-regression", action="store_true", help="status 1 where a cell became slower"
    )


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0, or for the kernels the status of benchmarks.report."""
    return _kernels(args) if args.what == "kernels" else _data(args)


def _kernels(args: argparse.Namespace) -> int:
    tree = Path(__file__).resolve().parents[2]
    if not (tree / "benchmarks" / "report.py").is_file():
        raise HimoError(
            "bench kernels: the benchmarks are not part of the installed package; run "
            f"`python -m benchmarks.report --out {args.out}` in a clone of the repository"
        )
    command = [sys.executable, "-m", "benchmarks.report"]
    for name in ("out", "baseline", "minutes", "threads", "device"):
        if (value := getattr(args, name)) is not None:
            command += [f"--{name}={value}"]
    command += ["--fail-on-regression"] if args.fail_on_regression else []
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    # `himo` sets the wait policy of threads for training; the benchmarks use torch's default.
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return subprocess.run(command, env={**others, "PYTHONPATH": path}).returncode


def _data(args: argparse.Namespace) -> int:
    settings = config.from_arguments(args)
    if not 0 < args.seconds <= _MAX_SECONDS:
        raise HimoError(f"--seconds: expected above 0 and up to 3600, got {args.seconds}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    index, _ = open_data(settings, Ranks())
    pairs = len(index)
    settings = recipes.with_schedule(recipes.with_model(settings, pairs), pairs)
    dataset = training_pairs(settings, index, named_config(settings.model))
    sampler = EpochSampler(len(dataset), settings.batch_size, seed=settings.seed)
    steps = by_step(dataset, sampler.order().tolist(), args.seconds)
    with worker_deaths():
        whole, first_s = loader(settings, dataset, sampler, args.seconds)
    print(table(settings, steps, whole, first_s))
    return 0


def by_step(dataset: CaptionedImages, rows: list[int], seconds: float) -> list[Rate]:
    """The rate of each step of reading in this process, over rows that can be read."""
    preprocess, index = dataset.preprocess, dataset.index

    def stages(row: int) -> Iterator[str]:
        if preprocess.mode == "exact":
            image = index.open_image(row)
            yield "decode"
            preprocess.uint8(image)
            yield "resize and crop"
        else:  # the decoder itself may shrink the image
            dataset.image(row)
            yield "decode, resize and crop"
        dataset.tokens(row)
        yield "tokenise" if dataset.cache is None else "read tokens"

    taken: dict[str, float] = {}
    samples = 0
    dataset.tokens(rows[0])  # the first call reads the vocabulary
    began = time.perf_counter()
    # An iterator has no length: the seconds end the loop, long before the last row.
    for row in passing_bar(iter(rows), "by step", "pair"):
        with suppress(ImageError):
            parts, before = {}, time.perf_counter()
            for name in stages(row):
                parts[name], before = time.perf_counter() - before, time.perf_counter()
            samples += 1
            taken = {name: taken.get(name, 0.0) + part for name, part in parts.items()}
        if time.perf_counter() - began > seconds:
            break
    if not samples:
        raise HimoError(f"{index.report.source}: none of the images tried can be read")
    return [Rate(name, samples, total) for name, total in taken.items()]


def loader(
    settings: TrainConfig, dataset: CaptionedImages, sampler: EpochSampler, seconds: float
) -> tuple[Rate, float]:
    """The rate of the trainer's loader, and the seconds until its first batch.

    The batches that the workers hold by then, two each, would flatter the rate and are not counted.
    """
    batches = training_loader(settings, dataset, sampler, pin_memory=False)
    ready, samples = 1 + 2 * settings.workers, 0
    asked = time.perf_counter()
    arrivals = []
    bar = passing_bar(_over_epochs(batches, sampler), "loader", "batch")
    for batch in bar:
        arrivals.append(time.perf_counter())
        if len(arrivals) <= ready:
            continue
        samples += len(batch.image)
        if arrivals[-1] - arrivals[ready - 1] > seconds or len(arrivals) >= ready + _MAX_BATCHES:
            break
    bar.close()
    return Rate("loader", samples, arrivals[-1] - arrivals[ready - 1]), arrivals[0] - asked


def _over_epochs(batches: BatchLoader, sampler: EpochSampler) -> Iterator[Sample]:
    # From the second epoch on: the page cache holds files of the first, which the steps have read.
    for epoch in itertools.count(1):
        sampler.set_epoch(epoch)
        yield from batches


def table(settings: TrainConfig, steps: list[Rate], whole: Rate, first_s: float) -> str:
    """The rates for a terminal, at most 80 columns wide."""
    alone = Rate("one process", steps[0].samples, sum(step.seconds for step in steps))
    loading = f"loader, --workers {settings.workers}"
    lines = [f"{'':<26}{'ms a pair':>10}{'pairs a second':>16}{'pairs':>8}"]
    for name, rate in [*((r.step, r) for r in steps), (alone.step, alone), (loading, whole)]:
        each_ms = 1e3 * rate.seconds / rate.samples
        pairs_a_second = "-" if rate.per_second is None else f"{rate.per_second:.1f}"
        lines.append(f"{name:<26}{each_ms:>10.2f}{pairs_a_second:>16}{rate.samples:>8}")
    first = f"The first batch came after {first_s:.2f} s."
    pairs = settings.batch_size
    step_s = pairs * whole.seconds / whole.samples
    if settings.workers:
        step = f"A step of {pairs} pairs"
        waits = f"waits for the loader where it takes less than {step_s:.3g} s."
    else:  # nothing is read while a step runs
        step = f"Without workers a step of {pairs} pairs"
        waits = f"always waits for the loader, {step_s:.3g} s."
    return "\n".join([*lines, "", f"{first} {step}", waits])

"""`himo doctor`: what is installed, and what would stop a training run before it starts."""

import argparse
import dataclasses
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping

import torch

from himo import config, recipes
from himo.config import TrainConfig
from himo.data import SampleIndex
from himo.device import usable_device
from himo.errors import HimoError, printable
from himo.memory import free_memory
from himo.model import named_config
from himo.tools.doctor import inputs, schedule, smoke, system
from himo.tools.doctor.check import Check
from himo_kernels import info

_NO_DATA = "(none)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `himo train`, all optional: its command line can be pasted."""
    config.add_arguments(parser, [item.name for item in dataclasses.fields(TrainConfig)])


def run(args: argparse.Namespace) -> int:
    """Prints what is installed and a line for each check; returns 1 for a problem, else 0."""
    settings = config.from_arguments(args, train_data=_NO_DATA)
    # A wrong name or recipe is an error before any check.
    if model := recipes.with_model(settings, None).model:
        named_config(model)
    print(info.report(), end="\n\n", flush=True)
    found = []
    for check in _checks(settings, settings.train_data != _NO_DATA):
        print(_line(check), flush=True)
        found.append(check.status)
    warnings, problems = found.count("warning"), found.count("problem")
    print(f"\n{_count(problems, 'problem')}, {_count(warnings, 'warning')}")
    return 1 if problems else 0


def _checks(settings: TrainConfig, has_data: bool) -> Iterator[Check]:
    yield from system.packages()
    yield system.extension()
    yield system.device(settings)
    yield system.threads(settings)
    yield system.precision(settings)
    # Temporary indices leave nothing behind.
    with tempfile.TemporaryDirectory(prefix="himo-doctor-") as folder:
        fields = ["train_data"] if has_data else []
        fields += ["val_data"] if settings.val_data is not None else []
        data = {field: inputs.opened(settings, field, folder) for field in fields}
        yield from _of_run(settings, data)
    yield smoke.step(settings)


def _of_run(settings: TrainConfig, data: Mapping[str, SampleIndex | Check]) -> Iterator[Check]:
    pairs = inputs.pairs(settings, data.get("train_data"))
    settings, config = recipes.with_model(settings, pairs), None
    if settings.pretrained is not None:
        check, config = inputs.checkpoint(settings.pretrained, settings)
        yield check
    model = config or named_config(settings.model or "ViT-B-16")  # of a checkpoint not read
    try:
        device = usable_device(settings.device)
    except HimoError:  # said above
        device = torch.device("cpu")
    settings = recipes.with_schedule(settings, pairs, config=model, free=free_memory(device))
    yield system.shared_memory(settings, model)
    yield schedule.host_memory(settings, model, device)
    yield system.open_files(settings)
    yield system.disk(settings, model)
    if pairs is not None:
        yield schedule.schedule(settings, pairs)
    for field, found in data.items():
        yield from inputs.data_set(settings, model, field, found)


def _line(check: Check) -> str:
    line = printable(f"{check.status:<8} {check.name:<13} {check.found}")
    if not sys.stdout.isatty():  # in a file or an issue a check stays on one line
        return line
    width = shutil.get_terminal_size().columns - 1
    return textwrap.fill(line, max(width, 40), subsequent_indent=" " * 23, break_on_hyphens=False)


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"

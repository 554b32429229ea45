"""`himo doctor`: what is installed, and what would stop a training run before it starts."""

import argparse
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator

from himo import config
from himo.config import TrainConfig
from himo.errors import printable
from himo.model import named_config
from himo.tools.doctor import inputs, smoke, system
from himo.tools.doctor.check import Check
from himo_kernels import info

_NO_DATA = "(none)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `himo train`, all optional: its command line can be pasted."""
    config.add_arguments(parser, [item.name for item in dataclasses.fields(TrainConfig)])


def run(args: argparse.Namespace) -> int:
    """Prints what is installed and a line for each check; returns 1 for a problem, else 0."""
    settings = config.from_arguments(args, train_data=_NO_DATA)
    named_config(settings.model)  # a wrong name is an error before any check
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
    model = named_config(settings.model)
    if settings.pretrained is not None:
        check, found = inputs.checkpoint(settings.pretrained, settings)
        yield check
        model = found or model
    yield system.shared_memory(settings, model)
    yield system.open_files(settings)
    yield system.disk(settings, model)
    if has_data:
        yield from inputs.data_set(settings, model, "train_data")
    if settings.val_data is not None:
        yield from inputs.data_set(settings, model, "val_data")
    yield smoke.step(settings)


def _line(check: Check) -> str:
    line = printable(f"{check.status:<8} {check.name:<13} {check.found}")
    if not sys.stdout.isatty():  # in a file or an issue a check stays on one line
        return line
    width = shutil.get_terminal_size().columns - 1
    return textwrap.fill(line, max(width, 40), subsequent_indent=" " * 23, break_on_hyphens=False)


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"

"""pytest plugin for another library's own tests: accelerates the losses that they construct.

PUBLISHED_LOSSES names the classes, as `module:class ...`; none: the library's own losses run.
PUBLISHED_REPORT names the file for what happened: a JSON object.
"""

import importlib
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from operator_calls import tell

import himo_kernels
from benchmarks.baselines import libraries

accelerated: Counter[str] = Counter()  # losses, by class
refused: Counter[str] = Counter()  # losses, by reason
computed: set[str] = set()  # tests during which an operator of this library ran
outcomes: dict[str, str] = {}  # of tests, by their ids


def pytest_configure() -> None:
    supply_lightly()
    for place in os.environ["PUBLISHED_LOSSES"].split():
        module, name = place.split(":")
        accelerate_new(getattr(importlib.import_module(module), name))
    tell(computing, pytest.MonkeyPatch())


def supply_lightly() -> None:
    """Makes `from lightly.loss import NTXentLoss` work without torchvision."""
    package, losses = ModuleType("lightly"), ModuleType("lightly.loss")
    package.loss, losses.NTXentLoss = losses, libraries.lightly()
    sys.modules.update({"lightly": package, "lightly.loss": losses})


def accelerate_new(kind: type) -> None:
    """Accelerates every instance of exactly this class, once it is constructed."""
    construct = kind.__init__

    def construct_and_accelerate(self: Any, *arguments: Any, **settings: Any) -> None:
        construct(self, *arguments, **settings)
        if type(self) is not kind:
            return
        try:
            himo_kernels.accelerate(self)
        except NotImplementedError as error:
            refused[str(error)] += 1
        else:
            accelerated[kind.__name__] += 1

    kind.__init__ = construct_and_accelerate


def computing(operator: str) -> None:
    computed.add(os.environ.get("PYTEST_CURRENT_TEST", "collection ").rsplit(" ", 1)[0])


@pytest.fixture(autouse=True)
def same_inputs() -> None:
    """Tests draw the same inputs in every run."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    found = {
        "accelerated": accelerated,
        "refused": refused,
        "computed": sorted(computed),
        "outcomes": outcomes,
    }
    Path(os.environ["PUBLISHED_REPORT"]).write_text(json.dumps(found))

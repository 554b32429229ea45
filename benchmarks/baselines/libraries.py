"""Losses of other libraries as published, imported without what they do not compute with.

`make setup` installs the packages without their dependencies: sentence-transformers and
pytorch-metric-learning would bring scipy and scikit-learn, which no loss here calls, and lightly
torchvision, which cannot be imported with a CPU build of torch. So the packages' own `__init__` is
not run where it imports these, and names that these losses never use are empty.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# `make setup` installs the oldest versions here; as packages they would shadow the newest.
OLDEST = Path(sys.prefix) / "losses_oldest"
VERSIONS = ("newest", "oldest")


def _folder(package: str, version: str) -> Path | None:
    """The folder of an installed package, not imported; None where it is not installed."""
    if version == "oldest":
        return OLDEST / package if (OLDEST / package).is_dir() else None
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@contextmanager
def _modules(supplied: Mapping[str, ModuleType]) -> Iterator[None]:
    """Supplies modules to imports in the block. Afterwards only what was there before is left."""
    roots = {name.split(".")[0] for name in supplied}
    before = {name: sys.modules.pop(name) for name in _loaded(roots)}
    sys.modules.update(supplied)
    try:
        yield
    finally:
        for name in _loaded(roots):
            del sys.modules[name]
        sys.modules.update(before)


def _loaded(roots: set[str]) -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in roots]


class _Empty(ModuleType):
    """A module of which every name can be imported, and none used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _absent(*names: str) -> dict[str, ModuleType]:
    return {name: _Empty(name) for name in names}


def _bare(folder: Path, *names: str) -> dict[str, ModuleType]:
    """Packages whose submodules can be imported but whose own code is not run."""
    found = {}
    for name in names:
        found[name] = ModuleType(name)
        found[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    return found


def _named(name: str, **values: object) -> dict[str, ModuleType]:
    module = ModuleType(name)
    vars(module).update(values)
    return {name: module}


@functools.cache
def sentence_transformers(version: str = "newest") -> SimpleNamespace | None:
    """MNRL, CachedMNRL, cos_sim and dot_score of sentence-transformers; None if not installed."""
    importlib.import_module("transformers.utils")  # not while its own dependencies are empty
    package = "sentence_transformers"
    folder = _folder(package, version)
    if folder is None:
        return None
    losses = f"{package}.losses"
    file, cached = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"
    if (folder / "sentence_transformer").is_dir():  # since 5.4
        losses = f"{package}.sentence_transformer.losses"
        file, cached = "multiple_negatives_ranking", "cached_multiple_negatives_ranking"
    parents = [losses.rsplit(".", count)[0] for count in range(losses.count(".") + 1)]
    supplied = _absent("scipy", "scipy.sparse", "sklearn", "sklearn.metrics")
    supplied |= _bare(
        folder, *parents, f"{package}.util", f"{package}.base", f"{package}.base.losses"
    )
    model = "SentenceTransformer"
    supplied |= _named(f"{package}.sentence_transformer.model", **{model: None})
    supplied |= _named(f"{package}.{model}", **{model: None})
    vars(supplied[package])[model] = None
    with _modules(supplied):
        util = supplied[f"{package}.util"]
        if (folder / "util").is_dir():
            for name in ("similarity", "distributed", "misc", "tensor"):
                part = importlib.import_module(f"{package}.util.{name}")
                vars(util).update({k: v for k, v in vars(part).items() if k not in vars(util)})
        else:  # util.py imports packages that nothing else here needs
            util.cos_sim, util.dot_score = _cos_sim, _dot_score
        found = SimpleNamespace(
            MultipleNegativesRankingLoss=importlib.import_module(f"{losses}.{file}"),
            CachedMultipleNegativesRankingLoss=importlib.import_module(f"{losses}.{cached}"),
        )
    # It imports every kind of model to ask whether the given one is of one kind.
    found.CachedMultipleNegativesRankingLoss.has_static_embedding_input = lambda model: False
    return SimpleNamespace(
        **{name: getattr(module, name) for name, module in vars(found).items()},
        cos_sim=util.cos_sim,
        dot_score=util.dot_score,
    )


def _cos_sim(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def _dot_score(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


for _function, _name in ((_cos_sim, "cos_sim"), (_dot_score, "dot_score")):
    # accelerate recognises them by name and module.
    _function.__name__, _function.__module__ = _name, "sentence_transformers.util"


@functools.cache
def metric_learning(version: str = "newest") -> SimpleNamespace | None:
    """losses, distances, reducers, regularizers and miners of pytorch-metric-learning, or None."""
    package = "pytorch_metric_learning"
    folder = _folder(package, version)
    if folder is None:
        return None
    supplied = _absent(
        "scipy", "scipy.stats", "scipy.special", "sklearn", "sklearn.metrics",
        "sklearn.preprocessing",
    )  # fmt: skip
    with _modules(supplied | _bare(folder, package)):
        names = ("losses", "distances", "reducers", "regularizers", "miners")
        return SimpleNamespace(
            **{name: importlib.import_module(f"{package}.{name}") for name in names}
        )


@functools.cache
def lightly(version: str = "newest") -> Any:
    """lightly's NTXentLoss, or None."""
    package = "lightly"
    folder = _folder(package, version)
    if folder is None:
        return None
    supplied = _bare(
        folder, package, f"{package}.loss", f"{package}.models", f"{package}.models.modules",
        f"{package}.utils",
    ) | _absent(f"{package}.models.utils")  # fmt: skip
    with _modules(supplied):
        return importlib.import_module(f"{package}.loss.ntx_ent_loss").NTXentLoss


@functools.cache
def grad_cache() -> Any:
    """GradCache's losses: the installed ones (it is not on PyPI), else UnpackagedGradCache."""
    folder = _folder("grad_cache", "newest")
    if folder is None:
        return UnpackagedGradCache
    with _modules(_bare(folder, "grad_cache")):
        return importlib.import_module("grad_cache.loss")


class UnpackagedGradCache:
    """The interface and formulas of GradCache's losses at commit 906f038."""

    class SimpleContrastiveLoss:
        def __init__(self, n_hard_negatives: int = 0) -> None:
            self.target_per_qry = n_hard_negatives + 1

        def __call__(
            self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean"
        ) -> Tensor:
            if target is None:
                target = self.target_per_qry * torch.arange(len(x))
            return F.cross_entropy(x @ y.T, target, reduction=reduction)

    class DistributedContrastiveLoss(SimpleContrastiveLoss):
        def __call__(self, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
            return super().__call__(self.gather_tensor(x), self.gather_tensor(y), **settings)

        def gather_tensor(self, x: Tensor) -> Tensor:
            tables = [torch.empty_like(x) for _ in range(dist.get_world_size())]
            dist.all_gather(tables, x)
            tables[dist.get_rank()] = x
            return torch.cat(tables)

    for _class in (SimpleContrastiveLoss, DistributedContrastiveLoss):
        # accelerate recognises them by name and module; pickle opens them by both.
        _class.__module__, _class.__qualname__ = "grad_cache.loss", _class.__name__

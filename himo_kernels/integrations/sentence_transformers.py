"""sentence-transformers' MultipleNegativesRankingLoss and its cached form, by `info_nce`.

Written for 6.2 and its predecessors since 1.0; the settings of later versions are read where a
loss has them. q are the queries, d the documents of all columns, s the scale, f the similarity.

    loss of row i     log Z_i - s f(q_i, d_i)
    query_to_doc      Z_i has exp(s f(q_i, d_j)) of every document: rows of info_nce
    query_to_query    and exp(s f(q_i, q_j)) of the other queries: more columns, own excluded
    doc_to_query      exp(s f(d_i, q_j)) of every query: rows of info_nce with the sides swapped
    doc_to_doc        and exp(s f(d_i, d_j)) of the other queries' documents

"joint" is one softmax over all: its log Z is the logaddexp of the two calls' losses, each of which
is relative to the same positive. "per_direction" is their mean.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from himo_kernels._checks import raise_value
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import check_backend
from himo_kernels.info_nce import info_nce
from himo_kernels.integrations.kinds import (
    Kind,
    as_under_autocast,
    base_named,
    check_settings,
    gathered,
    raise_setting,
)

NAME = "MultipleNegativesRankingLoss"
CACHED = "CachedMultipleNegativesRankingLoss"
# Classes of the same names in cross_encoder score pairs with a model: nothing to accelerate.
PACKAGES = ("sentence_transformers.losses", "sentence_transformers.sentence_transformer.losses")
SETTINGS = ("scale", "similarity_fct")
DIRECTIONS = {"query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"}
COSINES = ("cos_sim", "pytorch_cos_sim")


def of_embeddings(loss: Any, *, backend: str = "auto") -> Callable[..., Tensor]:
    """Returns the new compute_loss_from_embeddings, which is called with one tensor a column."""
    _check(loss, backend)

    def compute_loss_from_embeddings(
        self: Any, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        return _loss(self, embeddings, backend)

    return compute_loss_from_embeddings


def of_features(loss: Any, *, backend: str = "auto") -> Callable[..., Tensor]:
    """Returns the new forward for versions before 5.0, whose forward does everything."""
    _check(loss, backend)

    def forward(
        self: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return _loss(self, columns, backend)

    return forward


def cached(loss: Any, *, backend: str = "auto") -> Callable[..., Tensor]:
    """Returns the new calculate_loss, which is called with the mini-batches of each column."""
    _check(loss, backend)
    method = getattr(loss, "calculate_loss", None)
    if method is None or "with_backward" not in inspect.signature(method).parameters:
        expected = "with with_backward (sentence-transformers 3.4 or later)"
        raise_setting("accelerate", "calculate_loss", expected, "an earlier version")

    def calculate_loss(
        self: Any,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        value = _loss(self, [torch.cat(column) for column in reps], backend)
        if with_backward:
            value.backward()
            value = value.detach()
        return value

    return calculate_loss


def _class_of(module: Any, name: str, method: str = "forward") -> type | None:
    for package in PACKAGES:
        known = base_named(module, name, package)
        if known is not None and hasattr(known, method):
            return known
    return None


KINDS = tuple(
    Kind(
        f"sentence-transformers' {name}",
        partial(_class_of, name=name, method=needed),
        (method,),
        replacement,
        ("backend",),
        method,
    )
    for name, needed, method, replacement in (
        (CACHED, "forward", "calculate_loss", cached),
        (NAME, "compute_loss_from_embeddings", "compute_loss_from_embeddings", of_embeddings),
        (NAME, "forward", "forward", of_features),
    )
)


def _check(loss: Any, backend: str) -> None:
    check_backend("accelerate", backend)
    check_settings(NAME, loss, SETTINGS)
    _check_values("accelerate", loss)


def _check_values(operator: str, loss: Any) -> None:
    """Raises NotImplementedError for a setting whose loss is not expressed here."""
    similarity = loss.similarity_fct
    name = getattr(similarity, "__name__", repr(similarity))
    package = getattr(similarity, "__module__", "").split(".")[0]
    if package != "sentence_transformers" or name not in (*COSINES, "dot_score"):
        raise_setting(operator, "similarity_fct", "cos_sim or dot_score", name)
    directions = _directions(loss)
    if "query_to_doc" not in directions or not directions <= DIRECTIONS:
        raise_setting(
            operator,
            "directions",
            f"query_to_doc, and others of {sorted(DIRECTIONS)}",
            sorted(directions),
        )
    if "doc_to_doc" in directions and "doc_to_query" not in directions:
        raise_setting(operator, "directions", "doc_to_query with doc_to_doc", sorted(directions))
    mode, strength = getattr(loss, "hardness_mode", None), getattr(loss, "hardness_strength", 0.0)
    if mode is not None and strength != 0:
        raise_setting(operator, "hardness_mode", "None", f"{mode!r} of strength {strength}")


def _directions(loss: Any) -> set[str]:
    return set(getattr(loss, "directions", ("query_to_doc",)))


def _loss(loss: Any, columns: list[Tensor], backend: str) -> Tensor:
    _check_values(NAME, loss)
    if len(columns) < 2:
        raise_value(NAME, "embeddings", "of two columns or more", f"{len(columns)} of them")
    queries, *docs = as_under_autocast(*(_similar(loss, x) for x in columns))
    directions, joint = _directions(loss), getattr(loss, "partition_mode", "joint") == "joint"
    own, positive, first = queries, docs[0], 0
    if getattr(loss, "gather_across_devices", False) and dist.is_initialized():
        first = dist.get_rank() * len(own)
        queries, *docs = (gathered(NAME, x) for x in (queries, *docs))
    elif directions == {"query_to_doc", "doc_to_query"} and not joint and len(docs) == 1:
        return info_nce(queries, positive, loss.scale, backend=backend)
    rows = torch.arange(first, first + len(own), device=own.device)
    every = torch.cat(docs)

    def nlls(own: Tensor, keys: Tensor, others: Tensor | None) -> Tensor:
        # Of rows, whose positives are keys[rows]. All others of a row's number are no pair of it.
        pairs: dict[str, Any] = {"positives": rows, "directions": "rows", "reduction": "none"}
        if others is not None:
            numbers = torch.arange(len(queries), device=own.device)
            none = numbers.new_full((len(keys),), -1)
            of_keys = torch.cat([none, numbers.repeat(len(others) // len(queries))])
            pairs |= {"labels": (rows, of_keys), "same_label": "exclude"}
            keys = torch.cat([keys, others])
        return info_nce(own, keys, loss.scale, backend=backend, **pairs)

    found = [nlls(own, every, queries if "query_to_query" in directions else None)]
    if "doc_to_query" in directions:
        found.append(nlls(positive, queries, every if "doc_to_doc" in directions else None))
    of_directions = torch.stack(found)
    return (of_directions.logsumexp(0) if joint else of_directions).mean()


def _similar(loss: Any, x: Tensor) -> Tensor:
    # So that a product is the similarity, in float32 at least, as cos_sim and dot_score of 6.2.
    x = x.to(accumulation_dtype(x.dtype))
    return F.normalize(x, dim=-1) if loss.similarity_fct.__name__ in COSINES else x

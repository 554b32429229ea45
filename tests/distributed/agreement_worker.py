"""What every rank raises when one rank's arguments are wrong; run by torchrun."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from himo.parallel import end_process
from himo_kernels import distributed as hkd
from himo_kernels.dispatch import Backend, Operator
from himo_kernels.nn import HiMoLoss

dist.init_process_group("gloo")
RANK = dist.get_rank()
BAD = 1  # the rank with wrong arguments
found: dict[str, object] = {}


def attempt(name: str, call: Callable[[], object]) -> None:
    start = time.perf_counter()
    try:
        call()
        found[name] = ["nothing", "", 0.0]
    except Exception as error:
        found[name] = [type(error).__name__, str(error), time.perf_counter() - start]


def rows(count: int = 4, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(RANK)
    return torch.randn(count, width, generator=generator)


def with_entry(value: float) -> torch.Tensor:
    x = rows()
    if RANK == BAD:
        x[2, 3] = value
    return x


def zero_row() -> torch.Tensor:
    x = rows()
    if RANK == BAD:
        x[1] = 0
    return x


bad = RANK == BAD
strict = HiMoLoss(check_finite=True)
loss = HiMoLoss()
for value in ("nan", "inf"):
    attempt(f"{value} in a text", lambda value=value: strict(rows(), with_entry(float(value)), 1.0))
attempt("nan in an image", lambda: strict(with_entry(float("nan")), rows(), 1.0))
attempt("a text of zeros", lambda: strict(rows(), zero_row(), 1.0))
attempt("another width", lambda: loss(*[rows(width=5 if bad else 6)] * 2, 1.0))
attempt("another dtype", lambda: loss(*[rows().double() if bad else rows()] * 2, 1.0))
attempt("another number of texts", lambda: loss(rows(), rows(3 if bad else 4), 1.0))
attempt("one dimension", lambda: loss(*[rows().flatten() if bad else rows()] * 2, 1.0))
attempt("no tensor", lambda: loss(None if bad else rows(), rows(), 1.0))
attempt("another preset", lambda: HiMoLoss("official" if bad else "paper")(rows(), rows(), 1.0))
attempt("another strategy", lambda: hkd.info_nce(rows(), rows(), 1.0, strategy="ring"[bad:]))
attempt("a frozen tower", lambda: loss(rows().requires_grad_(not bad), rows(), 1.0))
attempt("no rows anywhere", lambda: loss(rows(0), rows(0), 1.0))
unchecked = HiMoLoss(check_ranks=False)
attempt("no rows, unchecked", lambda: unchecked(rows(0), rows(0), 1.0))
attempt("a wrong scale", lambda: loss(rows(), rows(), torch.ones(2) if bad else 1.0))
attempt("a wrong bias", lambda: loss(rows(), rows(), 1.0, torch.ones(2) if bad else None))
attempt("all_gather of another width", lambda: hkd.all_gather(rows(width=5 if bad else 6)))
attempt("pca of another tau", lambda: hkd.pca_reconstruct(rows(), 0.8 if bad else 0.9))
given = torch.arange(4)
of_labels = {
    "labels of another length": lambda: given[:3] if bad else given,
    "labels of floats": lambda: given.float() if bad else given,
    "labels in a list": lambda: given.tolist() if bad else given,
    "labels on one rank": lambda: given if bad else None,
}
for name, labels in of_labels.items():
    attempt(name, lambda labels=labels: hkd.info_nce(rows(), rows(), 1.0, labels=labels()))
    attempt(f"{name}, head", lambda labels=labels: loss(rows(), rows(), 1.0, labels=labels()))
ring = HiMoLoss(strategy="ring")
attempt(
    "labels and the ring",
    lambda: hkd.info_nce(rows(), rows(), 1.0, labels=given, strategy="ring"),
)
attempt("labels and the ring, head", lambda: ring(rows(), rows(), 1.0, labels=given))
for name, settings in {
    "another direction": {"directions": "columns" if bad else "rows"},
    "no direction": {"directions": "sideways" if bad else "rows"},
    "no string": {"directions": None if bad else "rows"},
    "another meaning of labels": {"labels": given, "same_label": "exclude" if bad else "positive"},
    "no meaning of labels": {"labels": given, "same_label": "none" if bad else "positive"},
}.items():
    attempt(name, lambda settings=settings: hkd.info_nce(rows(), rows(), 1.0, **settings))
Operator("other", {"numpy": Backend({})}, public=False)  # registers the name
attempt("a backend without a kernel", lambda: HiMoLoss(backend="numpy")(rows(), rows(), 1.0))
# Rank 0 has no rows. It would wait for the others, whose backend refuses their rows.
own = rows(0 if RANK == 0 else 4)
attempt("pca by a backend without a kernel", lambda: hkd.pca_reconstruct(own, backend="numpy"))
attempt("pca by no backend", lambda: hkd.pca_reconstruct(own, backend="gpu"))
attempt("and then a good step", lambda: loss(rows(), rows(), 1.0))
for repeat in range(20):  # G8: 20 of 20
    attempt(f"nan again {repeat}", lambda: strict(rows(), with_entry(float("nan")), 1.0))
Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(found))
dist.destroy_process_group()
end_process()

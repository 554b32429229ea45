"""The variants of the paper's tables 4, 5 and 6, and the values printed there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from himo.errors import HimoError

_PAPER_TAU, _PAPER_LAMBDA = 0.9, 1.0

# HiMo-CLIP (arXiv 2511.06653), tables 4 to 6: ViT-L/14, ShareGPT4V. R@1 from images to texts and
# back on Urban1k, DOCCI and Long-DCI, HiMo@2 averaged over these, HiMo@K on HiMo-Docci.
PAPER_COLUMNS = ("Urban1k", "DOCCI", "Long-DCI", "HiMo@2", "HiMo@K")
_FULL = ("93.0 / 93.1", "82.4 / 84.4", "62.2 / 61.9", "97.9", "0.88")  # in all three tables
_PAPER_TAUS = {
    0.6: ("85.2 / 84.3", "74.3 / 75.1", "51.4 / 49.4", "98.2", "0.86"),
    0.7: ("91.7 / 92.1", "81.3 / 82.8", "60.1 / 59.3", "98.3", "0.86"),
    0.8: ("93.3 / 93.6", "82.3 / 83.7", "62.5 / 61.9", "94.8", "0.79"),
    0.85: ("93.5 / 93.4", "81.6 / 83.3", "61.7 / 61.3", "96.4", "0.85"),
    0.9: _FULL,
    0.95: ("91.7 / 92.8", "80.9 / 83.0", "60.8 / 60.4", "94.6", "0.81"),
}
_PAPER_LAMBDAS = {
    2.0: ("93.1 / 92.3", "81.9 / 83.9", "61.6 / 61.4", "97.8", "0.88"),
    1.0: _FULL,
    0.5: ("92.8 / 93.1", "82.2 / 84.3", "62.3 / 61.8", "97.1", "0.87"),
}
TAUS, LAMBDAS = tuple(_PAPER_TAUS), tuple(_PAPER_LAMBDAS)  # unless others are asked for
_GLOBAL = ("91.7 / 92.8", "80.9 / 83.0", "60.8 / 60.4", "91.0", "0.69")
_COMPONENT = ("92.6 / 92.9", "80.9 / 82.5", "60.1 / 60.7", "96.2", "0.84")
_BOTH = ("87.5 / 91.4", "78.8 / 82.1", "57.7 / 57.8", "91.7", "0.69")


@dataclass(frozen=True)
class Variant:
    """One setting of the loss.

    Attributes:
        name: of its runs' folders, before the seed.
        flags: of `himo train`, which differ from the paper's preset.
    """

    name: str
    flags: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Table:
    """One table of the paper: a title, and each row's label, variant and printed values."""

    number: int
    title: str
    about: str
    rows: Sequence[tuple[str, Variant, tuple[str, ...] | None]]


FULL = Variant("full")


def tables(numbers: Sequence[int], taus: Sequence[float], lambdas: Sequence[float]) -> list[Table]:
    """The tables asked for. Rows of several tables with the same setting have one variant.

    Raises:
        HimoError: another number than 4, 5 or 6, a value out of range, or one given twice.
    """
    for flag, values in (("--tables", numbers), ("--taus", taus), ("--lambdas", lambdas)):
        if not values or len(set(values)) < len(values):
            raise HimoError(f"{flag}: expected each value once, got {_listed(values)}")
    if not {*numbers} <= {4, 5, 6}:
        raise HimoError(f"--tables: expected some of 4, 5 and 6, got {_listed(numbers)}")
    if not all(0 < tau <= 1 for tau in taus):
        raise HimoError(f"--taus: expected numbers in (0, 1], got {_listed(taus)}")
    if not all(0 <= weight < float("inf") for weight in lambdas):
        raise HimoError(f"--lambdas: expected finite numbers of at least 0, got {_listed(lambdas)}")
    made = {4: _taus(taus), 5: _losses(), 6: _lambdas(lambdas)}
    return [made[number] for number in sorted(numbers)]


def _taus(taus: Sequence[float]) -> Table:
    def variant(tau: float) -> Variant:
        return FULL if tau == _PAPER_TAU else Variant(f"tau-{_text(tau)}", {"tau": tau})

    return Table(
        4,
        "Share of the variance that HiDe keeps",
        "λ = 1. The texts' PCA keeps as many components as explain the share τ.",
        [(f"τ = {_text(tau)}", variant(tau), _PAPER_TAUS.get(tau)) for tau in taus],
    )


def _losses() -> Table:
    return Table(
        5,
        "Which losses, and what HiDe decomposes",
        "The global loss, the component loss, and both with λ = 1. τ = 0.9. HiDe decomposes the "
        "texts; u and v: the images too.",
        [
            ("global", Variant("global", {"lambda_comp": 0.0}), _GLOBAL),
            ("component", Variant("component", {"lambda_global": 0.0}), _COMPONENT),
            ("both, u and v", Variant("both-sides", {"decompose_images": True}), _BOTH),
            ("both", FULL, _FULL),
        ],
    )


def _lambdas(lambdas: Sequence[float]) -> Table:
    def variant(weight: float) -> Variant:
        if weight == _PAPER_LAMBDA:
            return FULL
        if weight == 0:  # as the first row of table 5
            return Variant("global", {"lambda_comp": 0.0})
        return Variant(f"lambda-{_text(weight)}", {"lambda_comp": weight})

    return Table(
        6,
        "Weight of the component loss",
        "τ = 0.9.",
        [(f"λ = {_text(w)}", variant(w), _PAPER_LAMBDAS.get(w)) for w in lambdas],
    )


def _listed(values: Sequence[float]) -> str:
    return ",".join(map(_text, values)) or "none"


def _text(value: float) -> str:
    """The number in six digits if that is exact, else in all: it names a run's folder."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)

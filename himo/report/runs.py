"""Reads run directories. A damaged file is no error: the notes of a `Run` name what is missing."""

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from himo.errors import HimoError
from himo.files import json_value, open_regular
from himo.training_log import read_lines
from himo.validation import COLUMNS as VALIDATION_COLUMNS

# The columns of metrics.jsonl that are drawn, over `step`.
COLUMNS = (
    *("epoch", "samples", "loss", "contrastive_loss", "component_loss", "logit_scale", "lr"),
    *("grad_norm", "rank", "data_time_s", "step_time_s", "samples_per_s", *VALIDATION_COLUMNS),
)
FILES = ("config.json", "metrics.jsonl", "eval.json")

_MAX_BYTES = 256 << 20  # of one file: a longer one was not written by a run
_MAX_RESUMED = 20  # lines of a resume that are shown, the last ones
_MAX_CHANGES, _MAX_NAME = 64, 80  # settings of each that are shown, and characters of each
_MAX_COMPONENTS = 4096  # of one spectrum
_MAX_TOP = 5  # images of a miss
_MAX_FOLLOWED = 8  # images that are followed from one validation to the next
_MAX_THUMBNAIL = 400_000  # characters
_THUMBNAIL = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class Spectrum:
    """Explained-variance ratios of the text features of one batch, descending."""

    step: int
    rank: int | None
    ratios: tuple[float, ...]

    def cumulative(self) -> list[float]:
        return list(accumulate(self.ratios))

    def reaching(self, share: float) -> int | None:
        """The smallest number of components that hold a share of the variance, if any does."""
        return next((i for i, held in enumerate(self.cumulative(), 1) if held >= share), None)


@dataclass(frozen=True)
class Curve:
    """The scores of one image against the growing prefixes of its caption."""

    image: str
    thumbnail: str | None  # a data: URL
    segments: tuple[str, ...]
    scores: tuple[float, ...]  # cosine similarities, one for each segment


@dataclass(frozen=True)
class Picture:
    """An image by name. `right`: it is the caption's. A thumbnail that cannot be shown is None."""

    name: str
    thumbnail: str | None
    right: bool


@dataclass(frozen=True)
class Miss:
    """A caption for which the model ranks another image first, and the images it fits best."""

    caption: str
    rank: int  # of its own image
    image: Picture
    top: tuple[Picture, ...]


@dataclass
class Followed:
    """An image whose caption is ranked in each validation: among all captions, 1 is the best."""

    image: str
    caption: str
    ranks: list[int]
    best: str  # the caption that fitted best in the last validation


@dataclass
class Run:
    """One run directory. Lists of `columns` go with `step`; None is a value not logged."""

    path: Path
    label: str = ""
    config: dict[str, Any] | None = None
    step: list[int] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    spectra: list[Spectrum] = field(default_factory=list)
    followed: list[Followed] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    curves: list[Curve] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # sentences on what is missing or wrong

    def column(self, name: str) -> list[float | None]:
        return self.columns[name] if name in self.columns else [None] * len(self.step)

    def has(self, name: str) -> bool:
        return any(value is not None for value in self.column(name))

    def setting(self, name: str) -> Any:
        return None if self.config is None else self.config.get(name)

    def result(self, *keys: str) -> float | None:
        """A number of eval.json by its keys; None where it is not there or not a number."""
        return as_number(lookup(self.evaluation, *keys))


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads run directories and gives each a name of its own.

    Raises:
        HimoError: a path is not a run directory, or is given twice.
    """
    runs = [read_run(Path(path)) for path in paths]
    for run, name in zip(runs, distinct_names(paths), strict=True):
        run.label = name
    return runs


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other.

    Raises:
        HimoError: a path is given twice.
    """
    real = [Path(path).resolve() for path in paths]
    for index, path in enumerate(real):
        if path in real[:index]:
            raise HimoError(f"{paths[index]}: given twice, expected each one once")
    depth = 1
    while len({path.parts[-depth:] for path in real}) < len(real):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in real]


def read_run(path: Path) -> Run:
    """Reads one run directory; parts that are missing or damaged become notes.

    Raises:
        HimoError: there is no such directory, or it holds none of a run's files.
    """
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise HimoError(f"{path}: {what}, expected the directory of a run")
    if not _holds_run(path):
        inside = sorted(child.name for child in path.iterdir() if _holds_run(child))
        hint = f"; it holds runs ({', '.join(inside[:3])}): name those" if inside else ""
        raise HimoError(f"{path}: is not a run, expected {', '.join(FILES)} in it, none is{hint}")
    run = Run(path, path.name)
    run.config = _read(run, "config.json", "the settings are unknown", _object)
    metrics = _read(run, "metrics.jsonl", "there are no training curves", bytes)
    if metrics is not None:
        _read_metrics(run, metrics)
    consequence = "there are no evaluation results until himo eval has written some"
    run.evaluation = _read(run, "eval.json", consequence, _object)
    if run.evaluation is not None:
        _read_pictures(run, run.evaluation)
    return run


def _holds_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in FILES)


def lookup(value: Any, *keys: str) -> Any:
    """The value under nested keys; None where one is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def as_number(value: Any) -> float | None:
    """A JSON number as a float; None for everything else, booleans too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if value > 0 else -math.inf


def as_numbers(value: Any) -> list[float] | None:
    """A list of numbers as floats; None for anything else."""
    if not isinstance(value, list):
        return None
    numbers = [as_number(item) for item in value]
    return None if None in numbers else [item for item in numbers if item is not None]


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


_T = TypeVar("_T")


def _read(run: Run, name: str, consequence: str, parse: Callable[[bytes], _T]) -> _T | None:
    """A file of a run; None and a note where it is missing or cannot be read."""
    path = run.path / name
    problem = "is missing"
    if path.exists():
        try:
            with open_regular(path) as file:
                data = file.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise HimoError(f"{path}: larger than {_MAX_BYTES >> 20} MiB")
            return parse(data)
        except ValueError as error:  # HimoError is one
            problem = f"cannot be read ({error})"
        except TypeError as error:  # of `_object`
            problem = str(error)
    run.notes.append(f"{name} {problem}: {consequence}.")
    return None


def _object(data: bytes) -> dict[str, Any]:
    value = json_value(data)
    if not isinstance(value, dict):
        raise TypeError(f"holds {type(value).__name__}, not an object")
    return value


def _read_metrics(run: Run, data: bytes) -> None:
    lines: dict[int, dict[str, Any]] = {}
    resumed = []
    bad = replaced = 0
    for line in read_lines(io.BytesIO(data)):
        if line is None:
            bad += 1
            continue
        if "resumed" in line:
            resumed.append(line)
            continue
        step = int(line["step"])
        # A resumed run logs the steps after its checkpoint again; the later lines replace them.
        while lines and next(reversed(lines)) >= step:
            lines.popitem()
            replaced += 1
        lines[step] = line
    if bad:
        what = plural(bad, "line")
        truncated = "" if data.endswith(b"\n") else " (the last one is cut off)"
        run.notes.append(f"metrics.jsonl: {what} could not be read and left out{truncated}.")
    if replaced:
        what = plural(replaced, "line")
        run.notes.append(f"metrics.jsonl: {what} logged again after a resume; the later ones hold.")
    # A start that is killed before its first checkpoint is logged again by the next one.
    run.notes += dict.fromkeys(n for line in resumed[-_MAX_RESUMED:] for n in _resumed(line))
    if not lines:
        run.notes.append("metrics.jsonl is empty: there are no training curves.")
        return
    run.step = list(lines)
    run.columns = {c: [as_number(line.get(c)) for line in lines.values()] for c in COLUMNS}
    odd = [
        f"{column} ({count})"
        for column, values in run.columns.items()
        if (count := sum(v is not None and not math.isfinite(v) for v in values))
    ]
    if odd:
        run.notes.append(f"metrics.jsonl: values that are NaN or infinite: {', '.join(odd)}.")
    run.followed = _followed(line.get("predictions") for line in lines.values())
    for step, line in lines.items():
        ratios = as_numbers(line.get("spectrum"))
        if ratios and all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios):
            rank = as_number(line.get("rank"))
            kept = int(rank) if rank is not None and 1 <= rank <= len(ratios) else None
            run.spectra.append(Spectrum(step, kept, tuple(ratios[:_MAX_COMPONENTS])))


def _followed(validations: Iterable[Any]) -> list[Followed]:
    """The images of all validations, in the order of the first; entries of other kinds are none."""
    found: dict[tuple[str, str], Followed] = {}
    for entries in validations:
        for entry in entries[:_MAX_FOLLOWED] if isinstance(entries, list) else ():
            image, caption, best = (lookup(entry, key) for key in ("image", "caption", "best"))
            rank = lookup(entry, "rank")
            if all(isinstance(text, str) for text in (image, caption, best)) and type(rank) is int:
                followed = found.setdefault((image, caption), Followed(image, caption, [], best))
                followed.ranks.append(rank)
                followed.best = best
    return list(found.values())[:_MAX_FOLLOWED]


def _resumed(line: dict[str, Any]) -> list[str]:
    """What a start after a checkpoint changed and lost, as notes."""
    step, what, notes = int(line["step"]), line["resumed"], []
    changes, unreadable = lookup(what, "changes"), as_number(lookup(what, "unreadable_lines"))
    if isinstance(changes, dict) and changes:
        values = (value if isinstance(value, list) else [value] for value in changes.values())
        listed = "; ".join(
            f"{name[:_MAX_NAME]} {' → '.join(str(part)[:_MAX_NAME] for part in value[:2])}"
            for name, value in list(zip(changes, values, strict=True))[:_MAX_CHANGES]
        )
        notes.append(f"From step {step} on the run has other settings: {listed}.")
    if unreadable:
        counted = f"{unreadable:,.0f} unreadable lines" if unreadable > 1 else "1 unreadable line"
        notes.append(f"metrics.jsonl: {counted} left out when the run was resumed at step {step}.")
    return notes


def _read_pictures(run: Run, evaluation: dict[str, Any]) -> None:
    curves, misses = (_entries(evaluation, key) for key in ("curves", "misses"))
    run.curves = [curve for entry in curves if (curve := _curve(entry)) is not None]
    run.misses = [miss for entry in misses if (miss := _miss(entry)) is not None]
    if bad := len(curves) - len(run.curves):
        what = plural(bad, "similarity curve")
        run.notes.append(f"eval.json: {what} could not be read and left out.")
    elif not curves:
        run.notes.append("eval.json holds no similarity curves.")
    if bad := len(misses) - len(run.misses):
        what = plural(bad, "miss", "misses")
        run.notes.append(f"eval.json: {what} of retrieval could not be read and left out.")


def _entries(evaluation: dict[str, Any], key: str) -> list[Any]:
    entries = evaluation.get(key)
    return entries if isinstance(entries, list) else []


def _curve(entry: Any) -> Curve | None:
    segments, scores = lookup(entry, "segments"), as_numbers(lookup(entry, "scores"))
    if not isinstance(segments, list) or not all(isinstance(words, str) for words in segments):
        return None
    if not scores or len(segments) != len(scores):
        return None
    image = lookup(entry, "image")
    name = image if isinstance(image, str) else ""
    return Curve(name, _thumbnail(entry), tuple(segments), tuple(scores))


def _miss(entry: Any) -> Miss | None:
    caption, rank, own, top = (lookup(entry, key) for key in ("caption", "rank", "image", "top"))
    if not isinstance(caption, str) or type(rank) is not int or not isinstance(top, list):
        return None
    if not all(isinstance(image, dict) for image in (own, *top)):
        return None
    own, *top = (
        Picture(str(image.get("name", "")), _thumbnail(image), image.get("right") is True)
        for image in (own, *top[:_MAX_TOP])
    )
    return Miss(caption, rank, own, tuple(top))


def _thumbnail(entry: Any) -> str | None:
    """The image of an entry, if it can go into a page as it is and fetches nothing."""
    value = lookup(entry, "thumbnail")
    if not isinstance(value, str) or len(value) > _MAX_THUMBNAIL:
        return None
    return value if _THUMBNAIL.fullmatch(value) else None


def differing(runs: Iterable[Run]) -> tuple[list[str], list[str]]:
    """The settings of several runs by name: those that differ, and those that do not."""
    configs = [run.config for run in runs if run.config is not None]
    keys = list(dict.fromkeys(key for config in configs for key in config if key != "starts"))
    # JSON text and not ==, for which 1, 1.0 and true are the same setting.
    values = {
        key: {
            json.dumps(config[key], sort_keys=True) if key in config else None for config in configs
        }
        for key in keys
    }
    different = [key for key in keys if len(values[key]) > 1]
    return different, [key for key in keys if len(values[key]) == 1]

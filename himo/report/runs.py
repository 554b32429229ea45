"""Reading run directories: whatever is in them, the result is a `Run` that says what is missing."""

import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from himo.errors import HimoError
from himo.files import json_value, open_regular
from himo.report.misses import Miss
from himo.report.misses import read as read_misses
from himo.training_log import read_lines
from himo.validation import COLUMNS as VALIDATION_COLUMNS

# The columns of metrics.jsonl that are drawn; `step` is one of its own.
COLUMNS = (
    "epoch",
    "samples",
    "loss",
    "contrastive_loss",
    "component_loss",
    "logit_scale",
    "lr",
    "grad_norm",
    "rank",
    "data_time_s",
    "step_time_s",
    "samples_per_s",
    *VALIDATION_COLUMNS,
)
FILES = ("config.json", "metrics.jsonl", "eval.json")

_MAX_BYTES = 256 << 20  # of one file: a longer one was not written by a run
_MAX_RESUMED = 20  # resumed with changes or losses: the last ones are told
_MAX_CHANGES, _MAX_NAME = 64, 80  # settings of each that are told, and characters of each
_MAX_COMPONENTS = 4096  # of one spectrum
_MAX_THUMBNAIL = 400_000  # characters
_THUMBNAIL = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class Spectrum:
    """Explained-variance ratios of the text features of one batch, descending."""

    step: int
    rank: int | None
    ratios: tuple[float, ...]

    def cumulative(self) -> list[float]:
        total, sums = 0.0, []
        for ratio in self.ratios:
            total += ratio
            sums.append(total)
        return sums


@dataclass(frozen=True)
class Curve:
    """The scores of one image against the growing prefixes of its caption."""

    image: str
    thumbnail: str | None  # a data: URL
    segments: tuple[str, ...]
    scores: tuple[float, ...]  # cosine similarities, one for each segment


@dataclass
class Run:
    """One run directory. Lists of `columns` go with `step`; None is a value not logged."""

    path: Path
    label: str = ""
    config: dict[str, Any] | None = None
    step: list[int] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    spectra: list[Spectrum] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    curves: list[Curve] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is missing or wrong, as sentences

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
    """Reads run directories and gives each a name that tells it from the others.

    Raises:
        HimoError: a path is not a run directory, or is given twice.
    """
    runs = [read_run(Path(path)) for path in paths]
    for run, name in zip(runs, distinct_names(paths), strict=True):
        run.label = name
    return runs


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """As much of the end of each path as tells it from the others.

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
        HimoError: there is no such directory, or none of a run's files is in it.
    """
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise HimoError(f"{path}: {what}, expected the directory of a run")
    present = [name for name in FILES if (path / name).exists()]
    if not present:
        inside = sorted(
            child.name
            for child in path.iterdir()
            if child.is_dir() and any((child / name).exists() for name in FILES)
        )
        hint = f"; it holds runs ({', '.join(inside[:3])}): name those" if inside else ""
        raise HimoError(f"{path}: is not a run, expected {', '.join(FILES)} in it, none is{hint}")
    run = Run(path, path.name)
    run.config = _read_object(run, "config.json", "the settings are unknown")
    _read_metrics(run)
    run.evaluation = _read_object(
        run, "eval.json", "there are no evaluation results until himo eval has written some"
    )
    _read_pictures(run)
    return run


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


def _read_bytes(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise HimoError(f"{path}: larger than {_MAX_BYTES >> 20} MiB")
    return data


def _read_object(run: Run, name: str, consequence: str) -> dict[str, Any] | None:
    path = run.path / name
    if not path.exists():
        run.notes.append(f"{name} is missing: {consequence}.")
        return None
    try:
        value = json_value(_read_bytes(path))
    except ValueError as error:  # HimoError is one
        run.notes.append(f"{name} cannot be read ({error}): {consequence}.")
        return None
    if not isinstance(value, dict):
        run.notes.append(f"{name} holds {type(value).__name__}, not an object: {consequence}.")
        return None
    return value


def _read_metrics(run: Run) -> None:
    path = run.path / "metrics.jsonl"
    if not path.exists():
        run.notes.append("metrics.jsonl is missing: there are no training curves.")
        return
    try:
        data = _read_bytes(path)
    except HimoError as error:
        run.notes.append(f"metrics.jsonl cannot be read ({error}): there are no training curves.")
        return
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
        # A resumed run logs again the steps after its checkpoint: the later lines hold.
        while lines and next(reversed(lines)) >= step:
            lines.popitem()
            replaced += 1
        lines[step] = line
    truncated = " (the last one is cut off)" if bad and not data.endswith(b"\n") else ""
    if bad:
        what = plural(bad, "line")
        run.notes.append(f"metrics.jsonl: {what} could not be read and left out{truncated}.")
    if replaced:
        what = plural(replaced, "line")
        run.notes.append(f"metrics.jsonl: {what} logged again after a resume; the later ones hold.")
    # A start that is killed before its first checkpoint is told again by the next one.
    run.notes += dict.fromkeys(n for line in resumed[-_MAX_RESUMED:] for n in _resumed(line))
    if not lines:
        run.notes.append("metrics.jsonl is empty: there are no training curves.")
        return
    run.step = list(lines)
    run.columns = {c: [as_number(line.get(c)) for line in lines.values()] for c in COLUMNS}
    odd = {
        column: count
        for column, values in run.columns.items()
        if (count := sum(v is not None and not math.isfinite(v) for v in values))
    }
    if odd:
        which = ", ".join(f"{column} ({count})" for column, count in odd.items())
        run.notes.append(f"metrics.jsonl: values that are NaN or infinite: {which}.")
    for step, line in lines.items():
        ratios = as_numbers(line.get("spectrum"))
        if ratios and all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios):
            rank = as_number(line.get("rank"))
            kept = int(rank) if rank is not None and 1 <= rank <= len(ratios) else None
            run.spectra.append(Spectrum(step, kept, tuple(ratios[:_MAX_COMPONENTS])))


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


def _read_pictures(run: Run) -> None:
    if run.evaluation is None:
        return
    entries = run.evaluation.get("curves")
    bad = 0
    for entry in entries if isinstance(entries, list) else []:
        segments, scores = lookup(entry, "segments"), as_numbers(lookup(entry, "scores"))
        if (
            not isinstance(segments, list)
            or not scores
            or len(segments) != len(scores)
            or not all(isinstance(segment, str) for segment in segments)
        ):
            bad += 1
            continue
        thumbnail = lookup(entry, "thumbnail")
        if not is_thumbnail(thumbnail):
            thumbnail = None
        image = lookup(entry, "image")
        name = image if isinstance(image, str) else ""
        run.curves.append(Curve(name, thumbnail, tuple(segments), tuple(scores)))
    if bad:
        what = plural(bad, "similarity curve")
        run.notes.append(f"eval.json: {what} could not be read and left out.")
    elif not run.curves:
        run.notes.append("eval.json holds no similarity curves.")
    run.misses, bad = read_misses(run.evaluation.get("misses"), is_thumbnail)
    if bad:
        what = plural(bad, "miss", "misses")
        run.notes.append(f"eval.json: {what} of retrieval could not be read and left out.")


def is_thumbnail(value: Any) -> bool:
    """Whether `value` is an image that can go into a page as it is, and fetches nothing."""
    return (
        isinstance(value, str)
        and len(value) <= _MAX_THUMBNAIL
        and _THUMBNAIL.fullmatch(value) is not None
    )


def differing(runs: Iterable[Run]) -> tuple[list[str], list[str]]:
    """The settings of several runs by name: those that differ, and those that do not."""
    configs = [run.config for run in runs if run.config is not None]
    keys = list(dict.fromkeys(key for config in configs for key in config if key != "starts"))
    missing = object()
    # JSON text and not ==, for which 1, 1.0 and true are the same setting.
    values = {
        key: {
            json.dumps(value, sort_keys=True)
            if (value := config.get(key, missing)) is not missing
            else None
            for config in configs
        }
        for key in keys
    }
    different = [key for key in keys if len(values[key]) > 1]
    return different, [key for key in keys if len(values[key]) == 1]

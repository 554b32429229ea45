"""How many records an index has, and how many were left out and why."""

from dataclasses import asdict, dataclass, field
from typing import Any

from himo.data.splits import listed_splits
from himo.errors import HimoError, printable

_EXAMPLES = 5  # of bad records and of missing images
_MAX_GROUPS = 1000  # top folders that are counted separately
_SHOWN_GROUPS = 10


@dataclass
class IndexReport:
    """The account of one reading of a data set.

    Attributes:
        source: the data set.
        kind: its format.
        records: samples in the index.
        bad: records left out because they are malformed or their path is refused, by reason.
        bad_examples: messages of the first of them, with file and line.
        missing: [missing, all] images by their first folder: `coco`, `sam`, ...
        missing_examples: paths of the first missing ones.
        ignored: files of a folder or shard that belong to no sample, by kind.
        splits: records of each split, those that are not read too, where the data name splits.
        sha256: digest of every path and caption in the index, in order: two runs with the same
            digest trained on the same subset.
    """

    source: str
    kind: str
    records: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    bad_examples: list[str] = field(default_factory=list)
    missing: dict[str, list[int]] = field(default_factory=dict)
    missing_examples: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The argument of `from_dict`: all fields but `source` and `kind`."""
        value = asdict(self)
        del value["source"], value["kind"]
        return value

    @staticmethod
    def from_dict(source: str, kind: str, value: Any) -> "IndexReport":
        """The report in a file; ValueError if `to_dict` cannot have given it."""
        if not isinstance(value, dict) or value.keys() != IndexReport("", "").to_dict().keys():
            raise ValueError("other fields")
        report = IndexReport(source, kind, **value)
        texts = [report.bad_examples, report.missing_examples]
        counts = [report.bad, report.ignored, report.splits]
        if not (
            _is_count(report.records)
            and isinstance(report.sha256, str)
            and all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in texts)
            and all(isinstance(x, dict) and all(map(_is_count, x.values())) for x in counts)
            and isinstance(report.missing, dict)
            and all(_is_share(x) for x in report.missing.values())
            and len(report.bad_examples) == min(_EXAMPLES, report.bad_count)
            and len(report.missing_examples) == min(_EXAMPLES, report.missing_count)
            and report.records > 0
        ):
            raise ValueError("other values")
        return report

    @property
    def bad_count(self) -> int:
        return sum(self.bad.values())

    @property
    def missing_count(self) -> int:
        return sum(missing for missing, _ in self.missing.values())

    @property
    def total(self) -> int:
        """All records read: in the index, bad or without their image."""
        return self.records + self.bad_count + self.missing_count

    def add_bad(self, reason: str, message: str) -> None:
        self.bad[reason] = self.bad.get(reason, 0) + 1
        if len(self.bad_examples) < _EXAMPLES:
            self.bad_examples.append(message)

    def add_image(self, path: str, is_missing: bool) -> None:
        group = path.split("/", 1)[0] if "/" in path else "."
        if group not in self.missing and len(self.missing) >= _MAX_GROUPS:
            group = "other folders"
        counts = self.missing.setdefault(group, [0, 0])
        counts[0] += is_missing
        counts[1] += 1
        if is_missing and len(self.missing_examples) < _EXAMPLES:
            self.missing_examples.append(path)

    def check(self, max_bad_fraction: float) -> None:
        """HimoError if more than this fraction of the records is bad, or no sample is left."""
        if self.bad_count > max_bad_fraction * self.total:
            share = f"{100 * self.bad_count / self.total:.3g} %"
            raise HimoError(
                f"{self.source}: {self.bad_count} of {self.total} records are bad ({share}, the "
                f"limit is {100 * max_bad_fraction:g} %): {_listed(self.bad)}; first: "
                f"{self.bad_examples[0]}; max_bad_fraction (--max-bad-fraction) sets the limit"
            )
        if self.records == 0:
            message = f"{self.source}: no sample is left{self._left_out()}"
            if self.missing_count:
                message += "; image_root (--image-root) names where they are"
            if self.bad_examples:
                message += f"; first: {self.bad_examples[0]}"
            raise HimoError(message)

    def check_missing(self) -> None:
        """HimoError if an image is missing, with how many by folder and the first paths."""
        if self.missing_count:
            raise HimoError(
                f"{self.source}: {self.missing_images()}; skip_missing_images "
                "(--skip-missing-images) leaves them out"
            )

    def summary(self) -> str:
        """One line: samples, format and what was left out."""
        samples = f"{self.source}: {self.records} samples ({self.kind})"
        return printable(samples + self._left_out())

    def _left_out(self) -> str:
        """The records left out, to follow a sentence; "" if there are none."""
        parts = [""]
        if self.bad_count:
            parts.append(f"{self.bad_count} bad records ({_listed(self.bad)})")
        if self.missing_count:
            parts.append(self.missing_images())
        ignored = {kind: count for kind, count in self.ignored.items() if count}
        if ignored:
            parts.append(f"ignored: {_listed(ignored)}")
        if len(self.splits) > 1:
            parts.append(f"the file has {listed_splits(self.splits)}")
        return "; ".join(parts)

    def missing_images(self) -> str:
        """How many images are missing, by their first folder, and the first of them."""
        groups = {name: counts for name, counts in self.missing.items() if counts[0]}
        shown = [f"{name} {a} of {b}" for name, (a, b) in list(groups.items())[:_SHOWN_GROUPS]]
        if len(groups) > _SHOWN_GROUPS:
            shown.append(f"{len(groups) - _SHOWN_GROUPS} more folders")
        total = sum(count for _, count in self.missing.values())
        first = ", ".join(self.missing_examples)
        counts = f"{self.missing_count} of {total} images are missing ({', '.join(shown)})"
        return f"{counts}; first: {first}"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _is_share(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(map(_is_count, value))
        and value[0] <= value[1]
    )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())

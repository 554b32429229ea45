"""Compares a resumed run with the run that wrote its checkpoint."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from himo.config import AT_RESUME, TrainConfig
from himo.data import SampleIndex
from himo.errors import HimoError, shortened
from himo.files import open_regular
from himo.flags import flag
from himo.model import CLIPConfig
from himo_kernels.nn import PRESETS

_PICTURES = 64  # images compared per data set, evenly spaced
_HEAD = 1 << 20  # bytes compared at the start of an image; its size is compared too
# For each flag, the switch of the preset that applies if the flag is not given.
_SWITCHES = {
    "tau": "variance_threshold",
    "lambda_comp": "component_weight",
    "lambda_global": "contrastive_weight",
    "label_smoothing": "label_smoothing",
}


def record(
    settings: TrainConfig,
    processes: int,
    model: CLIPConfig,
    train: SampleIndex,
    validation: SampleIndex | None,
) -> dict[str, Any]:
    """Returns everything that determines the result of a run, as JSON for its checkpoints.

    For the data it holds the digest stored in the index and the digests of a few images, so a large
    data set is not read again.

    Args:
        processes: the number of processes.
        model: the configuration of the model.
        train: the pairs to train on.
        validation: the pairs of --val-data, or None.
    """
    return {
        "settings": dataclasses.asdict(settings),
        "processes": processes,
        "model": model.to_dict(),
        "train_data": _content(train),
        "val_data": _content(validation) if validation is not None else None,
    }


@dataclasses.dataclass(frozen=True)
class Change:
    """One difference from the checkpoint. `rule` is a key of AT_RESUME."""

    name: str
    rule: str
    before: Any
    now: Any
    what: str  # its name in messages, followed by the value: --lr

    def refusal(self) -> str:
        return f"expected {self.what} {_shown(self.before)} as it began, got {_shown(self.now)}"

    def note(self) -> str:
        return f"{self.what} {_shown(self.now)} (before {_shown(self.before)})"

    def values(self) -> list[Any]:
        """Returns [before, now], as written to metrics.jsonl."""
        return [self.before, self.now]


def check(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: list[str], path: Path
) -> list[Change]:
    """Returns the allowed changes that may affect the result.

    Args:
        before, now: outputs of `record`. An older himo did not write all parts of before; missing
            parts are not compared.
        allowed: settings that may change although they affect the result.
        path: the path of the checkpoint, for messages.

    Raises:
        HimoError: there are changes that are not allowed; the message lists all of them.
    """
    changes = [
        *_settings(before, now),
        *_derived(before, now),
        *(c for name in ("train_data", "val_data") for c in _data(name, before, now)),
    ]
    never = [change for change in changes if change.rule == "never"]
    refused = [c for c in changes if c.rule == "refuse" and c.name not in allowed]
    if never or refused:
        names = ",".join(dict.fromkeys(change.name.replace("_", "-") for change in refused))
        advice = (
            "start a new run, with --pretrained from its weights"
            if never
            else f"--allow-changes {names} goes on with what is given now"
        )
        raise HimoError(
            f"{path}: a resumed run is the same run: "
            f"{'; '.join(change.refusal() for change in never + refused)}; {advice}"
        )
    return [change for change in changes if change.rule != "ignore"]


def unchecked(before: Mapping[str, Any]) -> str:
    """Returns the parts that an older himo did not record, in words; empty if none is missing."""
    missing = {"train_data": "the data", "model": "the model's configuration"}
    return " and ".join(words for name, words in missing.items() if name not in before)


def _settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    old, new = before["settings"], now["settings"]
    if all(old.get(name) == new[name] for name in ("loss", "preset")):
        # With the same loss and preset, compare the values in use. Else compare the given flags,
        # because the presets' values differ anyway.
        old, new = _effective(old), _effective(new)
    for rule, names in AT_RESUME.items():
        for name in names:
            # A flag missing from the checkpoint did not exist yet. If the digests of the data are
            # known, a new path only says that the files were moved; _data compares the digests.
            if name not in old or old[name] == new[name]:
                continue
            moved = name in ("train_data", "val_data") and before.get(name) and now.get(name)
            yield Change(name, "say" if moved else rule, old[name], new[name], flag(name))


def _derived(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    processes = before.get("processes", 1), now["processes"]
    if processes[0] != processes[1]:
        yield Change("processes", "refuse", *processes, "processes")
    pairs = _pairs(before), _pairs(now)
    if pairs[0] != pairs[1]:
        yield Change("pairs", "never", *pairs, "pairs in a step")
    for name, value in before.get("model", {}).items():
        if now["model"].get(name, value) != value:
            yield Change("model", "never", value, now["model"][name], f"a model with {name}")


def _pairs(state: Mapping[str, Any]) -> int:
    settings = state["settings"]
    batch = settings["batch_size"] * settings.get("accum_freq", 1)
    return int(batch * state.get("processes", 1))


def _data(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    # None means no validation. _settings reports validation turned on or off, by the flag.
    if not before.get(name) or not now.get(name):
        return
    old, new = before[name], now[name]
    if old["sha256"] != new["sha256"]:
        before_, now_ = (
            f"{part['pairs']} pairs [SHA-256 {part['sha256'][:12]}]" for part in (old, new)
        )
        # The order of the samples is a permutation of all pairs, so their number cannot change.
        rule = "never" if name == "train_data" and old["pairs"] != new["pairs"] else "refuse"
        yield Change(name, rule, before_, now_, f"{flag(name)} of")
        return
    pairs = [(image, old["pictures"].get(image), now) for image, now in new["pictures"].items()]
    compared = [pair for pair in pairs if None not in pair]
    others = [pair for pair in compared if pair[1] != pair[2]]
    if others:
        image, digest, digest_now = others[0]
        many = f"{digest_now}; {len(others)} of {len(compared)} pictures looked at are others"
        yield Change(name, "refuse", digest, many, f"{flag(name)} whose {image} is")


def _content(index: SampleIndex) -> dict[str, Any]:
    count = min(len(index), _PICTURES)
    rows = [number * len(index) // count for number in range(count)]
    return {
        "sha256": index.report.sha256,
        "pairs": len(index),
        "pictures": {index[row].image: _picture(index, row) for row in rows},
    }


def _picture(index: SampleIndex, row: int) -> str | None:
    """Returns a digest of an image's size and first bytes; None if it cannot be read."""
    try:
        source = index.image_source(row)
        if isinstance(source, bytes):
            size, head = len(source), source[:_HEAD]
        else:
            with open_regular(source) as file:
                size, head = os.fstat(file.fileno()).st_size, file.read(_HEAD)
    except HimoError:
        return None
    return hashlib.sha256(size.to_bytes(8, "little") + head).hexdigest()[:16]


def _effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings, with the preset's value for each switch that was not given."""
    values = dict(settings)
    # CLIP's loss has no preset: switches that are not given are 0.
    switches = PRESETS.get(values["preset"], {}) if values["loss"] == "himo" else {}
    for name, switch in _SWITCHES.items():
        if values.get(name) is None:
            values[name] = switches.get(switch, 0.0)
    return values


def _shown(value: Any) -> str:
    return shortened(str(value))

"""Several data sets in one call: everything is opened before the first is scored."""

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from himo.data import SampleIndex
from himo.data.paths import ImageRoot
from himo.data.records import RecordError
from himo.errors import HimoError, note
from himo.evaluate.captions import CaptionScores, evaluate_captions, open_for_evaluation
from himo.evaluate.cola import cola, image_places
from himo.evaluate.datasets import SETS, locate, locate_below, named
from himo.evaluate.encode import Coverage, Encoder
from himo.evaluate.himo_k import MORE_THAN, cut_in, read_himo_docci, score_himo_docci
from himo.evaluate.intervals import INTERVAL_RULE, Estimate, estimate
from himo.evaluate.metrics import rises
from himo.evaluate.result import add_himo_docci
from himo.evaluate.retrieval import RECALLS

WAYS = {"image_to_text": "I2T", "text_to_image": "T2I"}


@dataclass
class Item:
    """A data set to score.

    Attributes:
        name: of the set, or the path as given.
        kind: "captions", "prefixes" or "groups", as in `DataSet`.
        path, image_root: where it is.
        opened: the index of captions, and the records left out of it.
        captions_per_image: as in `DataSet`.
        protocol: the description of the set in the result.
    """

    name: str
    kind: str
    path: str
    image_root: str | None = None
    opened: tuple[SampleIndex, Coverage] | None = None
    captions_per_image: int | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


def open_items(
    data: Sequence[str],
    data_root: str | None,
    options: dict[str, Any],
    captions_per_image: int | None,
    more: Sequence[tuple[str, str]] = (),
) -> list[Item]:
    """The data sets of a call, each found and its files read.

    With `allow_missing` among the options, a named set that is not there is left out.

    Args:
        data: paths, NAME:FOLDER, or NAME for a set below `data_root`.
        options: of `open_for_evaluation`, for the paths; a named set takes `allow_missing` and
            `follow_links` alone.
        captions_per_image: of the paths.
        more: (kind, path) of sets of another kind, by their own flags.

    Raises:
        HimoError: something is missing in a set. Where there are several, a note says it of each
            before.
    """
    asked = [named(value) for value in data]
    names = [name or path for name, path in asked] + [path for _, path in more]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise HimoError(f"{twice[0]}: given twice, expected each data set once")
    _check_flags(asked, data_root, options | {"captions_per_image": captions_per_image}, more)
    items, problems = [], []
    for name, path in asked:
        try:
            if name is not None:
                items.append(_named_item(name, path, data_root, options))
            else:
                opened = open_for_evaluation(path, **options)
                item = Item(path, "captions", path, None, opened, captions_per_image)
                item.protocol = {"dataset": path, "split": options["split"] or "all"}
                items.append(item)
        except (HimoError, OSError) as error:
            problems.append(str(error))
    for kind, path in more:
        try:
            items.append(_checked(Item(path, kind, path, options["image_root"]), options))
        except (HimoError, OSError) as error:
            problems.append(str(error))
    _report(problems, len(names), options["allow_missing"] and bool(items))
    return items


def _check_flags(
    asked: Sequence[tuple[str | None, str]],
    data_root: str | None,
    options: dict[str, Any],
    more: Sequence[tuple[str, str]],
) -> None:
    """HimoError for a flag that no data set of the call takes."""
    of_all, default = ("allow_missing", "follow_links"), ("dataset_type", "auto")
    given = [key for key, value in options.items() if value and key not in of_all]
    given = [key for key in given if (key, options[key]) != default]
    if given and not more and all(name for name, _ in asked):
        raise HimoError(f"{given[0]}: means nothing for {asked[0][0]}, whose layout is known")
    if data_root is not None and all(folder for _, folder in asked):
        raise HimoError("--data-root: means nothing without --suite or a --data NAME")


def _report(problems: Sequence[str], total: int, allowed: bool) -> None:
    """Prints the problems; raises HimoError unless they are allowed."""
    if len(problems) == 1 and not allowed:
        raise HimoError(problems[0])
    for problem in problems:
        note(problem)
    if problems and not allowed:
        raise HimoError(
            f"{len(problems)} of {total} data sets cannot be scored, as said above; "
            "--allow-missing scores the others"
        )


def _named_item(name: str, folder: str, data_root: str | None, options: dict[str, Any]) -> Item:
    of = SETS[name]
    if not folder and data_root is None:
        raise HimoError(f"--data {name}: expected its folder, {name}:FOLDER, or --data-root")
    place = locate(name, folder) if folder else locate_below(name, data_root or "")
    item = Item(name, of.kind, place.path, place.image_root)
    item.captions_per_image = of.captions_per_image
    item.protocol = {
        "dataset": name,
        "title": of.title,
        "split": of.split,
        "official_size": {"images": of.images, "captions": of.captions} if of.images else None,
        "source": of.source,
        "licence": of.licence,
    }
    return _checked(item, options, place.options)


def _checked(item: Item, options: dict[str, Any], more: Mapping[str, Any] | None = None) -> Item:
    """The item with its files read; HimoError for a malformed one or a missing image."""
    allow_missing = bool(options["allow_missing"])
    if item.kind == "captions":
        item.opened = open_for_evaluation(
            item.path,
            allow_missing=allow_missing,
            follow_links=options["follow_links"],
            image_root=item.image_root,
            **(more or {}),
        )
        return item
    if item.kind == "prefixes":
        records, _ = read_himo_docci(item.path, allow_missing=allow_missing)
        places = {record.image: record.place for record in records}
    else:
        places = image_places(item.path, allow_missing=allow_missing)
    root = ImageRoot(item.image_root or os.path.dirname(os.path.abspath(item.path)))
    missing = []
    for image, place in places.items():
        try:
            root.resolve(image)
        except RecordError as error:
            missing.append(f"{place}: {image}: {error}")
    if missing and not allow_missing:
        raise HimoError(
            f"{len(missing)} of {len(places)} images are missing: {missing[0]}; --allow-missing "
            "uses the rest and counts it"
        )
    return item


@dataclass
class Scored:
    """The result of a data set: the sections of eval.json, and its measures with their draws."""

    sections: dict[str, Any]
    measures: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Sections for eval.json, the measures with their intervals."""
        measures = {}
        for name, of in self.measures.items():
            low, high = of.interval()
            measures[name] = {"value": of.value, "low": low, "high": high}
        return self.sections | {"measures": measures}


def score(encoder: Encoder, item: Item, allow_missing: bool) -> Scored:
    """Scores one data set with one model.

    Raises:
        HimoError: an image or a caption cannot be used, unless `allow_missing`.
    """
    if item.opened is not None:
        index, coverage = item.opened
        scores = evaluate_captions(encoder, index, deepcopy(coverage), item.captions_per_image)
        scored = Scored(scores.sections, _caption_measures(scores, item.name))
    elif item.kind == "prefixes":
        given = score_himo_docci(encoder, item.path, item.image_root, allow_missing=allow_missing)
        sections: dict[str, Any] = {}
        add_himo_docci(sections, item.path, given)
        rho = sections["histogram"]["rho"]
        scored = Scored(sections, {"HiMo@K": estimate(rho, name=item.name)})
    else:
        found = cola(encoder, item.path, item.image_root, allow_missing=allow_missing)
        sections = {"protocol": {"images": found["images"], "texts_cut": found["texts_cut"]}}
        correct = [100.0 * x for x in found["correct"]]
        scored = Scored(sections | {"cola": found}, {"COLA": estimate(correct, name=item.name)})
    protocol = scored.sections.get("protocol", {}) | protocol_of(encoder, item)
    scored.sections["protocol"] = protocol | {"interval_rule": INTERVAL_RULE}
    return scored


def protocol_of(encoder: Encoder, item: Item) -> dict[str, Any]:
    """What the result says of the set and of how the model sees it."""
    config = encoder.model.config
    return item.protocol | {
        "captions_per_image": item.captions_per_image,
        "context_length": config.context_length,
        "image_resolution": config.image_resolution,
    }


def _caption_measures(scores: CaptionScores, name: str) -> dict[str, Estimate]:
    """Recalls both ways and HiMo@2, 3 and K; a text belongs to the image of its first caption."""
    of_text: dict[int, int] = {}
    for text, image in zip(scores.texts, scores.captions.caption_images, strict=True):
        of_text.setdefault(text, image)
    groups = {"image_to_text": None, "text_to_image": list(of_text.values())}
    measures = {}
    for way, short in WAYS.items():
        ranks = scores.sections["ranks"][way]
        for k in RECALLS:
            hits = [100.0 * (rank <= k) for rank in ranks]
            measures[f"R@{k} {short}"] = estimate(hits, groups[way], name=name)
    owners = scores.captions.caption_images
    for segments in (2, 3):
        used, cut = cut_in(scores.series, segments)
        if used:
            values = (100.0 * rises(cut)).tolist()
            measures[f"HiMo@{segments}"] = estimate(values, [owners[x] for x in used], name=name)
    if rho := scores.sections["histogram"]["rho"]:
        long = [
            x for x, series in zip(owners, scores.series, strict=True) if len(series) > MORE_THAN
        ]
        measures["HiMo@K"] = estimate(rho, long, name=name)
    return measures

"""COLA (arXiv 2305.03689), multi-object matching: does each of two captions find its image?"""

import os
import posixpath
from typing import Any
from urllib.parse import urlsplit

import torch

from himo.data.paths import ImageRoot
from himo.data.records import RecordError, check_caption, check_encodable
from himo.errors import HimoError, quoted
from himo.evaluate.encode import Coverage, Encoder, ImageFiles
from himo.files import json_value, open_regular

_MAX_FILE = 64 << 20  # bytes; the published file has 210 groups in 60 kB


def cola(
    encoder: Encoder,
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """The percentage of groups [url1, caption1, url2, caption2] where each caption finds its image.

    A group counts where s(image1, caption1) > s(image2, caption1) and s(image2, caption2) >
    s(image1, caption2), both strictly. An image is the file in `image_root` with the name that ends
    its URL; nothing is fetched.

    Args:
        encoder: the model.
        path: the published JSON file.
        image_root: the directory of the images; by default the directory of the file.
        allow_missing: leaves out, and counts, groups that cannot be used.

    Returns:
        {"accuracy": percent, "used": groups, "left_out": groups, "coverage": {...}, "images": how
        many there are, "texts_cut": texts longer than the context, "correct": 1 or 0 of each group
        used}.

    Raises:
        HimoError: the file is not of this form, or an image cannot be read.
    """
    groups, coverage = _read(path, allow_missing)
    places = _places(groups)
    names = list(places)
    root = ImageRoot(image_root or os.path.dirname(os.path.abspath(path)))
    images = ImageFiles(root, names, list(places.values()))
    bad: dict[str, tuple[str, str]] = {}

    def failed(position: int, reason: str, message: str) -> None:
        if not allow_missing:
            coverage.leave_out(reason, message)
        bad[names[position]] = reason, message

    features = encoder.images(images, range(len(names)), failed)
    used = []
    for group in groups:
        wrong = next((bad[name] for name in group[1] if name in bad), None)
        if wrong is None:
            used.append(group)
        else:
            coverage.leave_out(*wrong)
    coverage.check(os.fspath(path))

    row = {name: position for position, name in enumerate(names)}
    texts = [caption for _, _, captions in used for caption in captions]
    # Of each group: caption 1 with images 1 and 2, then caption 2 with images 1 and 2.
    pair_text = torch.arange(len(texts)).repeat_interleave(2)
    pair_image = torch.tensor([row[name] for _, pair, _ in used for name in (*pair, *pair)])
    scored = encoder.score_texts(texts, pair_text, pair_image, features, 0)
    not_finite = scored.not_finite.view(-1, 2).any(dim=1)
    for position in not_finite.nonzero()[:, 0].tolist():
        message = f"{used[position][0]}: features of a caption are not finite"
        coverage.leave_out("not_finite", message)
    coverage.check(os.fspath(path))
    scores = scored.scores.view(-1, 2, 2)[~not_finite]
    correct = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    return {
        "accuracy": 100 * int(correct.sum()) / len(correct),
        "used": coverage.used,
        "left_out": coverage.total - coverage.used,
        "coverage": coverage.to_dict(),
        "images": len(names),
        "texts_cut": scored.cut,
        "correct": correct.int().tolist(),
    }


def image_places(path: str | os.PathLike[str], *, allow_missing: bool = False) -> dict[str, str]:
    """The images of the groups, and where each is named first; HimoError as `cola`."""
    groups, _ = _read(path, allow_missing)
    return _places(groups)


_Group = tuple[str, tuple[str, str], tuple[str, str]]  # place, image names, captions


def _places(groups: list[_Group]) -> dict[str, str]:
    places: dict[str, str] = {}
    for place, names, _ in groups:
        for name in names:
            places.setdefault(name, place)
    return places


def _read(path: str | os.PathLike[str], allow_missing: bool) -> tuple[list[_Group], Coverage]:
    with open_regular(path) as file:
        data = file.read(_MAX_FILE + 1)
    try:
        if len(data) > _MAX_FILE:
            raise ValueError(f"longer than {_MAX_FILE:,} bytes")
        values = json_value(data)
    except ValueError as error:
        raise HimoError(f"{path}: expected a JSON list: {error}") from error
    if not isinstance(values, list) or not values:
        raise HimoError(f"{path}: expected a list of groups, got {quoted(values)}")
    coverage = Coverage(len(values), allow_missing)
    groups: list[_Group] = []
    for number, value in enumerate(values, start=1):
        place = f"{path}: group {number}"
        try:
            groups.append(_group(place, value))
        except RecordError as error:
            coverage.leave_out(error.reason, f"{place}: {error}")
    coverage.check(os.fspath(path))
    return groups, coverage


def _group(place: str, value: Any) -> _Group:
    if not isinstance(value, list) or len(value) != 4:
        message = f"expected [url, caption, url, caption], got {quoted(value)}"
        raise RecordError("caption_count", message)
    texts = [check_caption(text, f"entry {number}") for number, text in enumerate(value, start=1)]
    try:
        names = [posixpath.basename(urlsplit(url).path) for url in texts[::2]]
    except ValueError as error:
        raise RecordError("type", f"{quoted(texts[0])} is not a URL: {error}") from error
    if not all([*names, texts[1], texts[3]]):
        raise RecordError("empty", f"an image or a caption is empty in {quoted(value)}")
    check_encodable(texts[1::2])
    return place, (names[0], names[1]), (texts[1], texts[3])

"""Files of features: the numbers as .npy or .safetensors, and their description as .json.

NAME.json has the ids in the order of the rows, the model, the data set, and the SHA-256 of the file
of numbers.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from himo.checkpoint import MODEL_ARGUMENTS
from himo.checkpoint.safetensors_files import read_safetensors, write_safetensors
from himo.errors import HimoError
from himo.evaluate.captions import DATA_OPTIONS
from himo.evaluate.result import write_result
from himo.files import atomic_path, json_value, open_regular, sha256_file

SUFFIXES = (".npy", ".safetensors")
_NAME = "features"  # of the tensor in a safetensors file


@dataclass
class About:
    """What the rows of features are of.

    Attributes:
        ids: the name of each row's image.
        model: `pretrained` and its `sha256`, and the further arguments of `himo.load`.
        data: `given` and the options of `open_images`.
    """

    ids: list[str]
    model: dict[str, Any]
    data: dict[str, Any]

    def __post_init__(self) -> None:
        if (
            not all(isinstance(name, str) for name in self.ids)
            or self.model.keys() != {"pretrained", "sha256", *MODEL_ARGUMENTS}
            or self.data.keys() != {"given", *DATA_OPTIONS}
        ):
            raise ValueError("other fields")


def write_features(path: Path, features: Tensor, about: About) -> None:
    """Writes float32 features [N, E] and their description."""
    if path.suffix == ".npy":
        with atomic_path(path, needed=features.nbytes) as temporary, open(temporary, "wb") as file:
            # Not a file: numpy writes one in C, and reports a full disk without its reason.
            np.save(SimpleNamespace(write=file.write), features.numpy(), allow_pickle=False)
    else:
        write_safetensors(str(path), {_NAME: features}, {})
    content = {"sha256": sha256_file(path), **asdict(about)}
    write_result(path.with_suffix(".json"), content)


def read_features(name: str) -> tuple[Tensor, About]:
    """The features [N, E] of `write_features`, and their description.

    Raises:
        HimoError: a file is missing or damaged, or the two do not belong together.
    """
    path = Path(name)
    if path.suffix not in SUFFIXES:
        raise HimoError(f"--features {name}: expected a name that ends in {' or '.join(SUFFIXES)}")
    actual = sha256_file(path)
    described = path.with_suffix(".json")
    with open_regular(described) as file:
        data = file.read()
    try:
        content = json_value(data)
        digest = content.pop("sha256")
        about = About(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HimoError(f"{described}: not what `himo encode` writes beside features") from error
    if digest != actual:
        raise HimoError(f"{name}: damaged, or not the features that {described} belongs to")
    with open_regular(path) as file:
        if path.suffix == ".npy":
            features = torch.from_numpy(np.load(file, allow_pickle=False))
        else:
            features = read_safetensors(file, name)[0][_NAME]
    if len(features) != len(about.ids):
        raise HimoError(f"{described}: {len(about.ids):,} ids of {len(features):,} features")
    return features, about

"""Features cached in a folder, so that the next evaluation of the same model and data reads them.

A file is named after the digest of all that decides its features: the model, the preprocessing, and
the content of every image or the tokens of every text. Another checkpoint or a changed image gives
another name, so a file is never stale.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from himo.checkpoint.safetensors_files import read_safetensors, write_safetensors
from himo.errors import HimoError, note
from himo.evaluate.metrics import nonfinite_rows
from himo.files import open_regular, os_reason

Kind = Literal["images", "texts"]

_ABOUT = "himo_features"  # in the metadata: what the features are of, as json
_NAME = "features"  # of the tensor


class FeatureCache:
    """Files of features in a folder.

    Args:
        folder: is made if it does not exist.
        model: the checkpoint's digest, and everything but the data that changes a feature.

    Raises:
        HimoError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], model: Mapping[str, Any]) -> None:
        self.folder, self.model = Path(folder), dict(model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HimoError(f"{folder}: cannot be made: {os_reason(error)}") from error

    def read(self, kind: Kind, data: str, shape: Sequence[int]) -> Tensor | None:
        """The features that `write` was given, float32 on the CPU; None if there are none.

        Args:
            kind: of the data.
            data: their digest.
            shape: [N, E].

        Raises:
            HimoError: the file is damaged, or holds other features than its name says.
        """
        path, about = self._place(kind, data)
        if not path.exists():
            return None
        with open_regular(path) as file:
            tensors, metadata = read_safetensors(file, os.fspath(path))
        features = tensors.get(_NAME)
        if metadata.get(_ABOUT) != about or features is None:
            raise HimoError(f"{path}: expected features of this model and data; delete it")
        if list(features.shape) != list(shape) or features.dtype != torch.float32:
            raise HimoError(
                f"{path}: expected float32 features {list(shape)}, got {features.dtype} "
                f"{list(features.shape)}; delete it"
            )
        note(f"features of {shape[0]:,} {kind} from {path}")
        return features

    def write(self, kind: Kind, data: str, features: Tensor) -> None:
        """Keeps float32 features [N, E], atomically; none that hold a value that is not finite."""
        if not nonfinite_rows(features):
            path, about = self._place(kind, data)
            write_safetensors(os.fspath(path), {_NAME: features}, {_ABOUT: about})

    def _place(self, kind: Kind, data: str) -> tuple[Path, str]:
        about = json.dumps({"kind": kind, "data": data, "model": self.model}, sort_keys=True)
        digest = hashlib.sha256(about.encode()).hexdigest()
        return self.folder / f"{kind}-{digest[:32]}.safetensors", about

"""Reads and writes checkpoints of HiMo-CLIP, Long-CLIP, OpenAI's CLIP, open_clip, Hugging Face.

`places` finds the files; `pickles`, `torch_files` and `safetensors_files` read their bytes.
`layouts` maps the names of tensors, and `configurations` the names of settings. Users call
`loading` and `conversion`. No file is ever executed: pickles are read as data.
"""

from himo.checkpoint.conversion import add_arguments, convert, run
from himo.checkpoint.loading import (
    CHOICES,
    MODEL_ARGUMENTS,
    add_model_arguments,
    digest,
    files_of,
    load,
    model_arguments,
    read_state_dict,
    save,
)

__all__ = [
    "CHOICES",
    "MODEL_ARGUMENTS",
    "add_arguments",
    "add_model_arguments",
    "convert",
    "digest",
    "files_of",
    "load",
    "model_arguments",
    "read_state_dict",
    "run",
    "save",
]

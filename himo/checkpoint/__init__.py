"""Checkpoints of HiMo-CLIP, Long-CLIP, OpenAI's CLIP, open_clip and Hugging Face, read and written.

`pickles`, `torch_files` and `safetensors_files` read bytes, and `places` finds them; `layouts`
knows the names of tensors and `configurations` those of settings; `loading` and `conversion` are
what users call. No file is ever executed: pickles are read as data.
"""

from himo.checkpoint.conversion import add_arguments, convert, run
from himo.checkpoint.loading import (
    CHOICES,
    add_model_arguments,
    load,
    model_arguments,
    read_state_dict,
    save,
)

__all__ = [
    "CHOICES",
    "add_arguments",
    "add_model_arguments",
    "convert",
    "load",
    "model_arguments",
    "read_state_dict",
    "run",
    "save",
]

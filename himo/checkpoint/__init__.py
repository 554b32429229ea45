"""Checkpoints of HiMo-CLIP, Long-CLIP, OpenAI's CLIP, open_clip and Hugging Face, read and written.

`pickles`, `torch_files` and `safetensors_files` read bytes; `layouts` knows the names; `loading`
and `conversion` are what users call. No file is ever executed: pickles are read as data.
"""

from himo.checkpoint.conversion import add_arguments, convert, run
from himo.checkpoint.loading import load, read_state_dict, save

__all__ = ["add_arguments", "convert", "load", "read_state_dict", "run", "save"]

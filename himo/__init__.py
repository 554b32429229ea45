"""HiMo-CLIP (arXiv 2511.06653) as a model, a trainer and an evaluation, on top of himo_kernels."""

from himo.checkpoint import load, save
from himo.model import HiMoCLIP
from himo.tokenizer import tokenize
from himo_kernels import __version__

__all__ = ["HiMoCLIP", "__version__", "load", "save", "tokenize"]

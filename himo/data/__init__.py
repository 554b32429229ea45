"""Captioned images: formats on disk, the sample index, the data set, its order and its loader."""

from himo.data.dataset import BadSamples, CaptionedImages, Sample
from himo.data.index import SampleIndex
from himo.data.index_report import IndexReport
from himo.data.loader import BatchLoader, make_loader
from himo.data.sampler import EpochSampler
from himo.data.sources import DATASET_TYPES, open_dataset
from himo.data.tokens import TokenCache, open_tokens
from himo.data.workers import worker_deaths

__all__ = [
    "DATASET_TYPES",
    "BadSamples",
    "BatchLoader",
    "CaptionedImages",
    "EpochSampler",
    "IndexReport",
    "Sample",
    "SampleIndex",
    "TokenCache",
    "make_loader",
    "open_dataset",
    "open_tokens",
    "worker_deaths",
]

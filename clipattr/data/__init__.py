"""Image shards, cached activations, and the order in which rows are served."""

from clipattr.data.features import Features, Ranks, SiteRows, cache_activations, load_features
from clipattr.data.images import ImageBatch, image_loader
from clipattr.data.index import ShardIndex, build_index, select_usable
from clipattr.data.shards import BadSample, Sample, find_shards
from clipattr.data.store import ActivationStore
from clipattr.data.stream import ActivationStream, EvaluationStream
from clipattr.data.thumbnails import read_thumbnails, write_thumbnails

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "BadSample",
    "EvaluationStream",
    "Features",
    "ImageBatch",
    "Ranks",
    "Sample",
    "ShardIndex",
    "SiteRows",
    "build_index",
    "cache_activations",
    "find_shards",
    "image_loader",
    "load_features",
    "select_usable",
    "write_thumbnails",
    "read_thumbnails",
]

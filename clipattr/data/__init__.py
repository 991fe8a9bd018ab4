"""Image shards, cached activations, and the order in which rows are served."""

from clipattr.data.features import FeatureStore, cache_features
from clipattr.data.images import ImageBatch, image_loader
from clipattr.data.order import rows_of_step
from clipattr.data.shards import BadSample, Sample, find_shards, index_shards, keep_complete

__all__ = [
    "BadSample",
    "FeatureStore",
    "ImageBatch",
    "Sample",
    "cache_features",
    "find_shards",
    "image_loader",
    "index_shards",
    "keep_complete",
    "rows_of_step",
]

"""Build WebDataset shards from folders, tables, other shards and hub datasets."""

from clipattr.build.build import BuildReport, Options, build_shards
from clipattr.build.open_source import Naming, open_source
from clipattr.build.pictures import Pictures
from clipattr.build.placement import Limits

__all__ = [
    "BuildReport",
    "Limits",
    "Naming",
    "Options",
    "Pictures",
    "build_shards",
    "open_source",
]

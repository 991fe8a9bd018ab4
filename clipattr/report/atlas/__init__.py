"""The atlas: static pages of latents and classes in one folder that opens without a server."""

from clipattr.report.atlas.content import (
    ClassEntry,
    ClassLatent,
    Column,
    Example,
    Label,
    LatentEntry,
    Overview,
    PairPoint,
    Reliance,
    UnexpectedEntry,
)
from clipattr.report.atlas.site import write_site

__all__ = [
    "ClassEntry",
    "ClassLatent",
    "Column",
    "Example",
    "Label",
    "LatentEntry",
    "Overview",
    "PairPoint",
    "Reliance",
    "UnexpectedEntry",
    "write_site",
]

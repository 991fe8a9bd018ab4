"""Image shards as a source: to split, shuffle, resize or repair what is a tar set already."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clipattr.build.sources import (
    Content,
    Failure,
    ItemError,
    Source,
    Trouble,
    check_classes,
    hash_rows,
)
from clipattr.data.index import ShardIndex, build_index
from clipattr.data.remote import Shard
from clipattr.data.shards import (
    IMAGE_FIELDS,
    Sample,
    read_json,
    read_label,
    size_of,
    version_of,
)
from clipattr.errors import DataError

# A name that a tar header holds in ASCII. TarWriter would leave out one that begins with "_".
FIELD = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,63}")


class TarItem(NamedTuple):
    """One sample of a shard, and the names of the classes, where they are known."""

    sample: Sample
    classes: tuple[str, ...] | None

    @property
    def name(self) -> str:
        """Its key."""
        return self.sample.key

    def read(self) -> Content:
        """All fields as they are; cls becomes a number, and json says where the sample was."""
        sample = self.sample
        image = sample.image_field
        assert image is not None, "`read_tars` lets no sample without an image through"
        for name in sample.fields:
            if not FIELD.fullmatch(name):
                raise ItemError(Trouble.bad_field, f"the name {name!r} cannot be written")
        try:
            fields = {name: sample.read(name) for name in sample.fields}
        except OSError as error:
            raise ItemError(Trouble.unreadable, str(error.strerror)) from None
        if self.classes and "cls" in fields:
            try:
                fields["cls"] = str(read_label(sample, "cls", self.classes)).encode()
            except DataError as error:
                raise ItemError(Trouble.unknown_label, str(error)) from None
        try:
            row = read_json(sample) if "json" in fields else {}
        except DataError as error:
            raise ItemError(Trouble.bad_field, str(error)) from None
        if "path" not in row:
            fields["json"] = json.dumps({"path": sample.key} | row).encode()
        return Content(fields.pop(image), fields)


@dataclass(frozen=True)
class TarItems:
    """Some samples of an index."""

    index: ShardIndex
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[TarItem]:
        for row in range(len(self.index)):
            yield TarItem(self.index.sample(row), self.classes)


def read_tars(
    paths: Sequence[Shard],
    classes: Sequence[str] | None = None,
    *,
    workers: int = 0,
    progress: bool = False,
) -> Source:
    """The samples of shards, in their order.

    Args:
        paths: the shards.
        classes: names in the order of the labels; with them, a label is checked, and may be a name.
        workers: processes that read the headers of large sets.
        progress: show a bar.
    """
    index = build_index(paths, cache=None, workers=workers, progress=progress)
    has_image = index.has(*IMAGE_FIELDS)
    failures = [
        Failure(Trouble.no_image, sample.key, f"has {', '.join(sorted(sample.fields))}")
        for sample in map(index.sample, np.flatnonzero(~has_image).tolist())
    ]
    index = index.select(has_image)
    names = None if classes is None else check_classes(classes)
    files = [[size_of(path), version_of(path)] for path in paths]

    def items(rows: Sequence[int]) -> TarItems:
        return TarItems(index.select(np.asarray(rows, dtype=np.int64)), names)

    return Source(
        kind="tars",
        names=[key.decode() for key in index.keys],
        sizes=np.maximum(index.sizes, 0).sum(axis=1),
        items=items,
        sha256=hash_rows([index.fingerprint, files, names]),
        classes=names,
        failures=failures,
    )

"""A dataset of the Hugging Face hub as a source: its images are Arrow rows, read by memory map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from clipattr.build.manifest import LABEL, Columns, choose_columns, import_extra, is_binary
from clipattr.build.source_files import fields_of
from clipattr.build.sources import (
    Content,
    ItemError,
    Source,
    Trouble,
    as_json,
    as_texts,
    hash_rows,
    number_labels,
)
from clipattr.errors import ConfigError, DataError

EXTRA = "hf-datasets"
_ROWS = 1000


class RowItem(NamedTuple):
    """One row: `dataset` gives the bytes of its image, or a path to them."""

    name: str
    dataset: Any
    row: int
    image: str
    label: int | None
    caption: str
    names: dict[str, list[str]]

    def read(self) -> Content:
        """The image, and the fields that belong to it."""
        row = dict(self.dataset[self.row])
        found = row.pop(self.image) or {}
        image, path = found.get("bytes"), found.get("path")
        if image is None:
            if path is None:
                raise ItemError(Trouble.no_image, f"the column {self.image!r} is empty")
            try:
                image = Path(path).read_bytes()
            except OSError as error:
                raise ItemError(Trouble.unreadable, f"{path}: {error.strerror}") from None
        content = {name: _value(value, self.names.get(name)) for name, value in row.items()}
        return Content(
            image, fields_of({"path": path or self.name} | content, self.label, self.caption)
        )


@dataclass(frozen=True)
class RowItems:
    """Some rows of a dataset."""

    dataset: Any
    rows: Sequence[int]
    image: str
    labels: list[int] | None
    captions: list[str] | None
    names: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RowItem]:
        for place, row in enumerate(self.rows):
            label = None if self.labels is None else self.labels[place]
            caption = "" if self.captions is None else self.captions[place]
            yield RowItem(f"row {row}", self.dataset, row, self.image, label, caption, self.names)

    def select(self, places: Sequence[int]) -> "RowItems":
        """Some of them."""
        return RowItems(
            self.dataset,
            [self.rows[place] for place in places],
            self.image,
            self.labels and [self.labels[place] for place in places],
            self.captions and [self.captions[place] for place in places],
            self.names,
        )


def load_hub(name: str, config: str | None, split: str) -> Any:
    """A dataset of the hub, of a folder of data files, or of one that `save_to_disk` wrote.

    Version 4 of `datasets`, which the extra asks for, runs no code of a dataset.
    """
    datasets = import_extra("datasets", EXTRA, f"hf:{name}")
    try:
        folder = Path(name)
        if (folder / "state.json").exists():
            return datasets.load_from_disk(name)
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder / split))
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"hf:{name}, split {split!r}, cannot be loaded: {error}") from error


def read_hub(
    dataset: Any,
    *,
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
    group: str | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """The rows of a `datasets.Dataset`.

    Args:
        dataset: in it, an image is bytes or a path.
        image: the column of images; default: the only one.
        label: default: the only column of class labels, or one that is called label.
        caption: default: one that is called caption.
        group: what decides the split.
        classes: names in the order of the labels; default: those that the dataset gives.
    """
    datasets = import_extra("datasets", EXTRA, "a hub set")
    image = _only_column(dataset, datasets.Image, image)
    known = {
        name: list(feature.names)
        for name, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    if label is None and known:
        label = _only_label(known)
    dataset = dataset.cast_column(image, datasets.Image(decode=False))
    schema = dataset.features.arrow_schema
    ignored = {
        f"column {name} (bytes)": len(dataset)
        for name in dataset.column_names
        if name != image and is_binary(schema.field(name).type)
    }
    kept = [name for name in dataset.column_names if f"column {name} (bytes)" not in ignored]
    chosen = choose_columns(
        kept, "the dataset", path=image, label=label, caption=caption, group=group
    )
    return _read_rows(dataset.select_columns(kept), chosen, known, classes, ignored)


def _read_rows(
    dataset: Any,
    columns: Columns,
    known: dict[str, list[str]],
    classes: Sequence[str] | None,
    ignored: dict[str, int],
) -> Source:
    def texts(column: str | None) -> list[str] | None:
        if column is None:
            return None
        names = known.get(column)
        return as_texts((_value(value, names) for value in dataset[column]), column)

    labels, captions, groups = texts(columns.label), texts(columns.caption), texts(columns.group)
    bad: dict[int, ItemError] = {}
    numbered = None
    if labels is not None:
        given = known.get(columns.label or "")
        numbered = number_labels(labels, classes or given, are_names=given is not None)
        bad |= numbered.bad
    elif classes is not None:
        raise ConfigError("the dataset has no column of labels, to which classes belong")
    for row, text in enumerate(groups or []):
        if not text.strip():
            bad[row] = ItemError(Trouble.malformed, f"the column {columns.group} is empty")
    rows = [row for row in range(len(dataset)) if row not in bad]
    numbers = None if numbered is None else [numbered.numbers[row] for row in rows]
    captions = None if captions is None else [captions[row] for row in rows]
    items = RowItems(dataset, rows, columns.path, numbers, captions, known)
    sizes = _image_sizes(dataset, columns.path)[rows]
    return Source(
        kind="hub",
        names=[f"row {row}" for row in rows],
        sizes=sizes,
        items=items.select,
        sha256=hash_rows(
            [item.name, item.label, item.caption, int(size)]
            for item, size in zip(items, sizes, strict=True)
        ),
        groups=None if groups is None else [groups[row] for row in rows],
        classes=None if numbered is None else numbered.classes,
        failures=[error.failure(f"row {row}") for row, error in sorted(bad.items())],
        ignored=ignored,
    )


def _value(value: object, names: list[str] | None) -> object:
    """A class label by its name; -1 is how a hidden one is written."""
    if names is not None and isinstance(value, int):
        return names[value] if value >= 0 else None
    return as_json(value)


def _only_label(known: dict[str, list[str]]) -> str:
    if len(known) == 1:
        return next(iter(known))
    if LABEL not in known:
        raise ConfigError(f"which column holds the labels? There are {', '.join(known)}")
    return LABEL


def _only_column(dataset: Any, kind: type, asked: str | None) -> str:
    found = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if asked is None and len(found) == 1:
        return found[0]
    if asked is None or asked not in found:
        wanted = "which column holds the images" if asked is None else f"{asked!r} holds no images"
        raise ConfigError(
            f"{wanted}? The dataset has the columns {', '.join(dataset.column_names)}; of images: "
            f"{', '.join(found) or 'none'}"
        )
    return asked


def _image_sizes(dataset: Any, image: str) -> Int64[np.ndarray, " row"]:
    """Bytes of each image, from Arrow's offsets: no image is read. Of a path, those of its file."""
    compute = import_extra("pyarrow.compute", EXTRA, "a hub set")
    sizes: list[int] = []
    for table in dataset.select_columns([image]).with_format("arrow").iter(_ROWS):
        column = table.column(image)
        lengths = compute.binary_length(compute.struct_field(column, "bytes")).to_pylist()
        paths = compute.struct_field(column, "path").to_pylist()
        for length, path in zip(lengths, paths, strict=True):
            if length is None and path is not None and Path(path).is_file():
                length = Path(path).stat().st_size
            sizes.append(length or 0)
    return np.array(sizes, dtype=np.int64)

"""What new shards are made of: the form that folders, manifests, tar sets and hub sets share.

A source knows the names and sizes of its samples, and what cannot be one; it has read no image.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from clipattr.errors import DataError

# 3, and 3.0 as a table with gaps writes it.
NUMBER = re.compile(r"([0-9]+)(?:\.0+)?")


class Trouble(Enum):
    """Why something of the source is no sample of the shards."""

    missing = "missing file"
    outside = "path outside the folder"
    repeated = "path twice"
    malformed = "malformed row"
    no_class = "in no class folder"
    no_label = "no label"
    unknown_label = "unknown label"
    unreadable = "cannot be read"
    no_image = "no image"
    bad_image = "bad image"
    bad_field = "bad field"


class Failure(NamedTuple):
    """What is left out: `name` is what the source calls it."""

    trouble: Trouble
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.trouble.value} ({self.what})"

    def to_json(self) -> dict[str, str]:
        """For `failures.jsonl`."""
        return {"name": self.name, "trouble": self.trouble.name, "what": self.what}

    @classmethod
    def from_json(cls, entry: Mapping[str, str]) -> "Failure":
        """The reverse of `to_json`."""
        return cls(Trouble[entry["trouble"]], entry["name"], entry["what"])


class ItemError(Exception):
    """Raised where an item turns out to be a `Failure`."""

    def __init__(self, trouble: Trouble, what: str) -> None:
        super().__init__(what)
        self.trouble = trouble
        self.what = what

    def failure(self, name: str) -> Failure:
        """The failure of the item with that name."""
        return Failure(self.trouble, name, self.what)


class Content(NamedTuple):
    """A sample as it lies in the source: the bytes of its image, and its other fields."""

    image: bytes
    fields: dict[str, bytes]


@runtime_checkable
class Item(Protocol):
    """One sample to be; `read` raises ItemError."""

    @property
    def name(self) -> str:
        """What the source calls it."""
        ...

    def read(self) -> Content:
        """Fetch it."""
        ...


@runtime_checkable
class Items(Protocol):
    """Some items of a source, small enough to be sent to a process."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


@dataclass(frozen=True)
class Source:
    """Samples to be, in the order of the source.

    Attributes:
        kind: folder, manifest, tars or hub.
        names: of each sample, unique; they decide split and order.
        groups: of each sample, where samples with one group belong in one split.
        splits: of each sample, where the source has splits of its own.
        sizes: bytes of each sample, as far as they are known without reading it.
        items: the items of some rows.
        sha256: over all that decides what is written, but the bytes of the images.
        classes: their names, in the order of the labels; None where only numbers are known.
        failures: what is no sample, found without reading an image.
        ignored: what no sample was expected to be, by kind.
        folder: what was searched for files, if anything.
    """

    kind: str
    names: Sequence[str]
    sizes: Int64[np.ndarray, " sample"]
    items: Callable[[Sequence[int]], Items]
    sha256: str
    groups: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    classes: tuple[str, ...] | None = None
    failures: list[Failure] = field(default_factory=list)
    ignored: Mapping[str, int] = field(default_factory=dict)
    folder: Path | None = None


class Numbered(NamedTuple):
    """The classes of labels; a label without a number has its `ItemError` in `bad`."""

    numbers: list[int]
    classes: tuple[str, ...] | None
    bad: dict[int, ItemError]


def number_labels(
    labels: Sequence[str], classes: Sequence[str] | None, *, are_names: bool = False
) -> Numbered:
    """The number of each label, -1 where it has none.

    With `classes`, a label is a number or a name of theirs. Without, labels are all numbers, or all
    names, which are sorted then. `are_names`: a label such as 7 is a name, too.
    """
    if not are_names:
        labels = [label.strip() for label in labels]
    matches = [None if are_names else NUMBER.fullmatch(label) for label in labels]
    names = _find_names(labels, matches) if classes is None else check_classes(classes)
    places = {} if names is None else {name: place for place, name in enumerate(names)}
    numbers: list[int] = []
    bad: dict[int, ItemError] = {}
    for row, (label, match) in enumerate(zip(labels, matches, strict=True)):
        number = int(match[1]) if match else places.get(label, -1)
        if not label:
            bad[row] = ItemError(Trouble.no_label, "the label is empty")
        elif number < 0 or (names is not None and number >= len(names)):
            assert names is not None
            allowed = _describe(names) + ("" if are_names else ", and numbers")
            bad[row] = ItemError(Trouble.unknown_label, f"{label!r}; allowed are {allowed}")
        numbers.append(-1 if row in bad else number)
    return Numbered(numbers, names, bad)


def _find_names(
    labels: Sequence[str], matches: Sequence[re.Match[str] | None]
) -> tuple[str, ...] | None:
    """The names that occur, sorted; None when the labels are numbers."""
    given = [row for row, label in enumerate(labels) if label]
    numbers = [labels[row] for row in given if matches[row]]
    names = [labels[row] for row in given if not matches[row]]
    if numbers and names:
        raise DataError(
            f"labels are numbers, such as {numbers[0]!r}, and names, such as {names[0]!r}: list "
            "the names of the classes in a file, in their order, and name it as classes"
        )
    return None if numbers else check_classes(sorted(set(names)))


def _describe(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown}, ... ({len(names)} classes)" if len(names) > 3 else shown


def check_classes(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if each can be a line of `classes.txt`, from which a job reads them stripped."""
    lines: dict[str, str] = {}
    for name in names:
        line = name.strip()
        if not line or not line.isprintable():
            raise DataError(f"the class name {name!r} cannot stand in a list of one name a line")
        if line in lines:
            raise DataError(f"two classes have one name: {lines[line]!r} and {name!r}")
        lines[line] = name
    return tuple(names)


def hash_rows(rows: Iterable[object]) -> str:
    """sha256 over rows of plain JSON."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def as_json(value: object) -> object:
    """A value that JSON holds: dates and the like become text, and what is no number null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return str(value)


def as_texts(values: Iterable[object], column: str) -> list[str]:
    """A column of labels, captions or paths as text; empty where there is none."""
    texts: list[str] = []
    for value in values:
        found = as_json(value)
        if isinstance(found, list | dict):
            raise DataError(f"the column {column!r} holds {value!r}, where one text is needed")
        texts.append("" if found is None else str(found))
    return texts

"""Image files as samples, whatever names them: a folder or a table."""

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipattr.build.sources import Content, Failure, ItemError, Source, Trouble, as_json, hash_rows


class FileItem(NamedTuple):
    """One image file, and what is known of it."""

    name: str
    path: str
    label: int | None
    caption: str
    row: Mapping[str, object]

    def read(self) -> Content:
        """The file, and the fields that belong to it."""
        try:
            with open(self.path, "rb") as file:
                image = file.read()
        except OSError as error:
            raise ItemError(Trouble.unreadable, str(error.strerror)) from None
        return Content(image, fields_of(self.row, self.label, self.caption))


def fields_of(row: Mapping[str, object], label: int | None, caption: str) -> dict[str, bytes]:
    """The members beside the image; without a caption there is no txt."""
    fields = {"json": json.dumps(row).encode()}
    if label is not None:
        fields["cls"] = str(label).encode()
    if caption:
        fields["txt"] = caption.encode("utf-8", "replace")
    return fields


@dataclass(frozen=True)
class FileItems:
    """Some files below `root`, in columns; `table` holds what goes into the JSON member."""

    root: str
    names: list[str]
    labels: list[int] | None
    captions: list[str] | None
    table: dict[str, list[object]]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[FileItem]:
        for row, name in enumerate(self.names):
            columns = {column: as_json(values[row]) for column, values in self.table.items()}
            yield FileItem(
                name,
                os.path.join(self.root, name),
                None if self.labels is None else self.labels[row],
                "" if self.captions is None else self.captions[row],
                {"path": name} | columns,
            )

    def select(self, rows: Sequence[int]) -> "FileItems":
        """Some of them."""
        return FileItems(
            self.root,
            [self.names[row] for row in rows],
            self.labels and [self.labels[row] for row in rows],
            self.captions and [self.captions[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.table.items()},
        )


class File(NamedTuple):
    """A file that is there."""

    name: str
    size: int
    mtime_ns: int


def inspect_file(name: str, path: str) -> File:
    """Size and time of a file, which must be there."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ItemError(Trouble.missing, "does not exist") from None
    except OSError as error:
        raise ItemError(Trouble.unreadable, str(error.strerror)) from None
    if not stat.S_ISREG(found.st_mode):
        raise ItemError(Trouble.missing, "is no file")
    return File(name, found.st_size, found.st_mtime_ns)


def source_of_files(
    kind: str,
    root: Path,
    files: list[File],
    failures: list[Failure],
    *,
    labels: list[int] | None = None,
    captions: list[str] | None = None,
    table: dict[str, list[object]] | None = None,
    groups: list[str] | None = None,
    splits: list[str] | None = None,
    classes: tuple[str, ...] | None = None,
    ignored: Mapping[str, int],
) -> Source:
    """The source of files that are there; the lists are as long as `files`."""
    names = [file.name for file in files]
    items = FileItems(os.path.abspath(root), names, labels, captions, table or {})
    rows = (
        [file, item.label, item.caption, item.row] for file, item in zip(files, items, strict=True)
    )
    return Source(
        kind=kind,
        names=names,
        sizes=np.array([file.size for file in files], dtype=np.int64),
        items=items.select,
        sha256=hash_rows(rows),
        groups=groups,
        splits=splits,
        classes=classes,
        failures=failures,
        ignored=dict(ignored),
        folder=root if kind == "folder" else None,
    )

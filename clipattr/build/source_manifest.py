"""A table as a source: it lists image files, with labels, captions and anything else."""

import os
from collections.abc import Sequence
from pathlib import Path

from clipattr.build.manifest import Columns, Table
from clipattr.build.placement import SPLIT_NAME
from clipattr.build.source_files import File, inspect_file, source_of_files
from clipattr.build.sources import ItemError, Source, Trouble, as_texts, number_labels
from clipattr.errors import ConfigError


def read_listed(
    table: Table,
    columns: Columns,
    root: Path,
    classes: Sequence[str] | None = None,
    *,
    are_names: bool = False,
) -> Source:
    """The files that a table lists, in its order.

    Args:
        table: what was read by `read_table`.
        columns: the names of those that have a meaning.
        root: where relative paths start, and what no path leads out of.
        classes: names in the order of the labels.
        are_names: a label such as 7 is a name, too.
    """
    base = os.path.join(os.path.abspath(root), "")
    failures = list(table.failures)
    paths = as_texts(table.columns[columns.path], columns.path)
    texts = table.texts(columns.label)
    numbered = None if texts is None else number_labels(texts, classes, are_names=are_names)
    if numbered is None and classes is not None:
        raise ConfigError(f"{table.path} has no column of labels, to which classes belong")
    groups = table.texts(columns.group)
    splits = table.texts(columns.split)
    files: list[File] = []
    good: list[int] = []
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        try:
            name = locate(base, path)
            if first.setdefault(name, row) != row:
                raise ItemError(Trouble.repeated, f"{table.where(first[name])} has it already")
            if numbered is not None and row in numbered.bad:
                raise numbered.bad[row]
            if groups is not None and not groups[row].strip():
                raise ItemError(Trouble.malformed, f"the column {columns.group} is empty")
            if splits is not None and not SPLIT_NAME.fullmatch(splits[row]):
                what = f"the column {columns.split} holds {splits[row]!r}, which names no split"
                raise ItemError(Trouble.malformed, what)
            files.append(inspect_file(name, base + name))
            good.append(row)
        except ItemError as bad:
            failures.append(bad.failure(f"{table.where(row)}, {path}"))
    captions = table.texts(columns.caption)
    return source_of_files(
        "manifest",
        root,
        files,
        failures,
        labels=None if numbered is None else [numbered.numbers[row] for row in good],
        captions=None if captions is None else [captions[row] for row in good],
        table={name: [values[row] for row in good] for name, values in table.columns.items()},
        groups=None if groups is None else [groups[row] for row in good],
        splits=None if splits is None else [splits[row] for row in good],
        classes=None if numbered is None else numbered.classes,
        ignored=dict(table.ignored.most_common()),
    )


def locate(base: str, path: str) -> str:
    """The path relative to the folder `base`; links are not followed here."""
    if not path or "\0" in path:
        raise ItemError(Trouble.malformed, "there is no path")
    if "://" in path:
        raise ItemError(Trouble.malformed, "is a URL: fetch the images first, as img2dataset does")
    whole = os.path.normpath(os.path.join(base, path))
    if not whole.startswith(base):
        raise ItemError(Trouble.outside, f"allowed are paths inside {base}")
    return whole.removeprefix(base)

"""What all recipes share: from official tables and folders to the rows of a source, one by one.

A row that cannot be used becomes a failure that names its table and its number there, as a
spreadsheet shows it; nothing is dropped without being counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipattr.build.manifest import LABEL, PATH, Columns, Table, read_table
from clipattr.build.source_folder import Walk
from clipattr.build.source_manifest import read_listed
from clipattr.build.sources import Failure, ItemError, Source, Trouble, as_texts
from clipattr.errors import DataError

CUE, GROUP, SPLIT = "cue", "group", "split"
INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,15})")
DECIMAL = re.compile(r"-?[0-9]{1,15}\.[0-9]{1,15}")

Cells = Mapping[str, str]
Row = dict[str, object]


class LeftOut(Exception):  # noqa: N818  nothing went wrong
    """Raised where a row is meant to be no sample; its text names the kind, which is counted."""


@dataclass(frozen=True)
class Listing(Table):
    """The rows of the samples to be; `places` says where each was written."""

    places: Sequence[str] = ()

    def where(self, row: int) -> str:
        """Table and row."""
        return self.places[row]


@dataclass(frozen=True)
class Official:
    """An official download, read.

    Attributes:
        listing: columns path, label, and what else is known; cue and group where there is a cue.
        root: where the paths start.
        classes: in the order of the labels; None: the names that occur, sorted.
        splits: those that must have a sample; empty when the data set has none of its own.
        together: the column whose values stay in one split when the user splits.
    """

    listing: Listing
    root: Path
    classes: tuple[str, ...] | None
    splits: tuple[str, ...] = ()
    together: str | None = None

    def source(self) -> Source:
        """The samples, with labels, splits and all fields."""
        listing = self.listing
        split = SPLIT if self.splits else None
        if split is None:
            listing.columns.pop(SPLIT, None)
        columns = Columns(PATH, LABEL, None, self.together, split)
        source = read_listed(listing, columns, self.root, self.classes, are_names=True)
        empty = [name for name in self.splits if name not in (source.splits or ())]
        if empty:
            why = f"; the first failure is {source.failures[0]}" if source.failures else ""
            raise DataError(
                f"{listing.path}: the split {empty[0]!r} is empty; there are "
                f"{dict(Counter(source.splits))}, and {len(source.failures)} rows that cannot be "
                f"used{why}. Is the download complete?"
            )
        return source


def find_path(folder: Path, *names: str) -> Path:
    """The first of the names that is there."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: name the one of the unpacked download")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise DataError(
        f"{folder} holds no {' and no '.join(names)}; it holds {found or 'nothing'}. "
        "Name the folder of the unpacked download"
    )


def read_official(path: Path, *needed: str) -> Table:
    """A table that must have some columns."""
    table = read_table(path, needed[0])
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    return table


def list_rows(tables: Sequence[Table], make: Callable[[Cells], Row]) -> Listing:
    """`make` gives the fields of each row, or raises ItemError or LeftOut."""
    rows: list[Row] = []
    places: list[str] = []
    failures = [failure for table in tables for failure in table.failures]
    ignored: Counter[str] = Counter()
    for table in tables:
        ignored += table.ignored
        texts = {name: as_texts(values, name) for name, values in table.columns.items()}
        for number in range(len(table.rows)):
            try:
                rows.append(make({name: column[number].strip() for name, column in texts.items()}))
                places.append(table.where(number))
            except ItemError as bad:
                failures.append(bad.failure(table.where(number)))
            except LeftOut as kind:
                ignored[str(kind)] += 1
    if not rows:
        return Listing(tables[0].path, _no_columns(), [], failures, ignored)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Listing(tables[0].path, columns, [], failures, ignored, places)


def _no_columns() -> dict[str, list[object]]:
    return {name: [] for name in (PATH, LABEL, SPLIT)}


def look_up(cells: Cells, column: str, names: Mapping[str, str], trouble: Trouble) -> str:
    """What a cell means; only the values that the data set has are allowed."""
    found = cells[column]
    if found not in names:
        raise ItemError(trouble, f"{column} is {found!r}; allowed are {', '.join(names)}")
    return names[found]


def parse_cells(cells: Cells) -> Row:
    """Numbers as numbers, and empty cells as null; an identifier such as 0012 stays text."""
    return {name: parse_cell(cell) for name, cell in cells.items()}


def parse_cell(cell: str) -> object:
    """One cell."""
    if INTEGER.fullmatch(cell):
        return int(cell)
    if DECIMAL.fullmatch(cell):
        return float(cell)
    return cell or None


def mark_cue(row: Row, label: str, column: str | None) -> Row:
    """Add cue and group: the column as it is, and its value beside the label.

    A row without a value has the cue null and is in the group of those.
    """
    if column is None:
        return row
    value = row[column]
    return row | {CUE: value, GROUP: f"{label}, {column}={'unknown' if value is None else value}"}


def check_column(table: Table, column: str | None, option: str) -> None:
    """Raise DataError when a column that the user named is not there."""
    if column is not None and column not in table.columns:
        raise DataError(
            f"{option} {column}: {table.path} has no such column; it has {', '.join(table.columns)}"
        )


def join_tables(table: Table, key: str, other: Table) -> Table:
    """The columns of `other` beside those of `table`, by a key that both have.

    A row whose key is not in `other`, or was there already, is a failure.
    """
    rows_of: dict[str, int] = {}
    failures = list(table.failures) + list(other.failures)
    for row, name in enumerate(as_texts(other.columns[key], key)):
        if rows_of.setdefault(name, row) != row:
            what = f"{key} {name!r} is in {other.where(rows_of[name])} already"
            failures.append(Failure(Trouble.repeated, other.where(row), what))
    good: list[int] = []
    found: list[int] = []
    for row, name in enumerate(as_texts(table.columns[key], key)):
        if name in rows_of:
            good.append(row)
            found.append(rows_of[name])
        else:
            what = f"{key} {name!r} has no row in {other.path.name}"
            failures.append(Failure(Trouble.malformed, table.where(row), what))
    added = {
        name: [values[row] for row in found]
        for name, values in other.columns.items()
        if name not in table.columns
    }
    kept = {name: [values[row] for row in good] for name, values in table.columns.items()}
    numbers = [table.rows[row] for row in good]
    return Table(table.path, kept | added, numbers, failures, table.ignored + other.ignored)


class Images:
    """Image files by what the tables call them: the name of the file, without its suffix."""

    def __init__(self, root: Path, *folders: str) -> None:
        """Search some folders below `root`; at least one of them must be there."""
        self.folders = [name for name in folders if (root / name).is_dir()]
        if not self.folders:
            find_path(root, *folders)  # which says what is there
        self._paths: dict[str, str] = {}
        for folder in self.folders:
            for file in Walk(root / folder).files:
                stem = file.name.rpartition("/")[2].rpartition(".")[0]
                self._paths.setdefault(stem, f"{folder}/{file.name}")

    def find(self, name: str) -> str:
        """The path of an image, relative to the root."""
        if name not in self._paths:
            what = f"there is no image {name!r} in {', '.join(self.folders)}"
            raise ItemError(Trouble.missing, what)
        return self._paths[name]

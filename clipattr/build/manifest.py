"""Tables that list images: CSV, TSV and Parquet files, read into columns."""

import csv
import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as arrow
from pyarrow import parquet

from clipattr.build.sources import Failure, Trouble, as_texts
from clipattr.errors import ConfigError, DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
DELIMITERS = ",;\t|"
PATH, LABEL, CAPTION = "path", "label", "caption"


class Columns(NamedTuple):
    """Names of the columns with a meaning; None for what a table does not have."""

    path: str
    label: str | None
    caption: str | None
    group: str | None
    split: str | None = None


@dataclass(frozen=True)
class Table:
    """A table in columns; `rows` are its rows as a spreadsheet numbers them."""

    path: Path
    columns: dict[str, list[object]]
    rows: Sequence[int]
    failures: list[Failure] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def where(self, row: int) -> str:
        """The row, for a person."""
        return f"{self.path.name}, row {self.rows[row]}"

    def texts(self, column: str | None) -> list[str] | None:
        """A column as text; None when there is no such column."""
        return None if column is None else as_texts(self.columns[column], column)


def choose_columns(
    found: Sequence[str],
    where: object,
    *,
    path: str | None = PATH,
    label: str | None = None,
    caption: str | None = None,
    group: str | None = None,
    split: str | None = None,
) -> Columns:
    """The names, checked; those of label and caption that are not asked for may be absent."""
    for name in (path, label, caption, group, split):
        if name is not None and name not in found:
            raise ConfigError(f"{where} has no column {name!r}; it has {', '.join(found)}")
    return Columns(
        path or PATH,
        label or (LABEL if LABEL in found else None),
        caption or (CAPTION if CAPTION in found else None),
        group,
        split,
    )


def read_table(path: Path, path_column: str = PATH) -> Table:
    """Read a table by the suffix of its name."""
    try:
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path)
        return _read_csv(path, path_column)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _read_csv(path: Path, path_column: str) -> Table:
    """A CSV file in UTF-8, quoted as in RFC 4180. Its first line names the columns.

    The delimiter is the one that makes `path_column` a column.
    """
    try:
        # What Excel saves begins with a byte order mark; a quoted cell may hold line breaks.
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = _find_delimiter(path, header, path_column)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                return _read_rows(path, reader)
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from None


def _find_delimiter(path: Path, header: str, path_column: str) -> str:
    for delimiter in DELIMITERS:
        names = next(csv.reader([header], delimiter=delimiter))
        if path_column in [name.strip() for name in names]:
            return delimiter
    raise ConfigError(
        f"{path} has no column {path_column!r}; its first line is {header.strip()[:200]!r}. "
        "Columns are separated by a comma, a semicolon, a tab or a bar"
    )


def _read_rows(path: Path, reader: Any) -> Table:
    names = [name.strip() for name in next(reader)]
    _check_names(path, names)
    columns: list[list[object]] = [[] for _ in names]
    rows: list[int] = []
    failures: list[Failure] = []
    ignored: Counter[str] = Counter()
    for number, cells in enumerate(reader, start=2):
        if not cells:
            ignored["blank lines"] += 1
        elif len(cells) != len(columns):
            what = f"{len(cells)} cells, but the first line names {len(columns)} columns"
            failures.append(Failure(Trouble.malformed, f"{path.name}, row {number}", what))
        else:
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
            rows.append(number)
    return Table(path, dict(zip(names, columns, strict=True)), rows, failures, ignored)


def _check_names(path: Path, names: Sequence[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice")


def _read_parquet(path: Path) -> Table:
    try:
        read = parquet.ParquetFile(path).read()
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file: {error}") from None
    _check_names(path, read.column_names)
    columns: dict[str, list[object]] = {}
    ignored: Counter[str] = Counter()
    for name in read.column_names:
        if is_binary(read.schema.field(name).type):
            ignored[f"column {name} (bytes)"] += read.num_rows
        else:
            columns[name] = read.column(name).to_pylist()
    return Table(path, columns, range(1, read.num_rows + 1), ignored=ignored)


def is_binary(kind: Any) -> bool:
    """Whether a type of Arrow holds bytes, which JSON cannot."""
    children = [kind.field(number).type for number in range(kind.num_fields)]
    if arrow.types.is_map(kind):
        children = [kind.key_type, kind.item_type]
    bytes_types = (
        arrow.types.is_binary(kind),
        arrow.types.is_large_binary(kind),
        arrow.types.is_fixed_size_binary(kind),
    )
    return any(bytes_types) or any(is_binary(child) for child in children)


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """A package that only an extra of clipattr brings."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        _refuse_import(module, extra, purpose, error)


def _refuse_import(module: str, extra: str, purpose: str, error: ImportError) -> NoReturn:
    raise ConfigError(
        f"{purpose} needs {module.partition('.')[0]} ({error}): pip install 'clipattr[{extra}]'"
    ) from None

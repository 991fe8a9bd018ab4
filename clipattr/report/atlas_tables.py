"""The atlas as tables for other programs: a row per latent, a row per unexpected pair."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as arrow
from pyarrow import parquet

from clipattr.atomic import atomic_file

Column = Sequence[object]


def write_table(columns: Mapping[str, Column], path: Path, described: Mapping[str, str]) -> None:
    """Parquet, whole or not at all; `described` goes into the metadata of the schema."""
    table = arrow.table({name: arrow.array(list(values)) for name, values in columns.items()})
    metadata = {f"clipattr.{name}": text for name, text in described.items()}
    with atomic_file(path) as file:
        parquet.write_table(table.replace_schema_metadata(metadata), file, compression="zstd")


def format_table(columns: Mapping[str, Column]) -> str:
    """The same as CSV: six digits, lists of words separated by semicolons, nothing for None."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([_format(value) for value in row])
    return file.getvalue()


def _format(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "; ".join(str(each) for each in value)
    return "" if value is None else value

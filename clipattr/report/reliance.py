"""On what each class relies: the first latents as a table to read, all of them for other programs.

`reliance.parquet` is a long table, one row group per class in the order of the classes, so that a
reader takes one class without the others. Latents that never fired are left out.
"""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import torch
from pyarrow import parquet

from clipattr.atomic import atomic_file
from clipattr.attribution import Reliance

_NUMBERS = ("mean_attribution", "share_of_images", "share_positive")
_COLUMNS = arrow.schema(
    [
        ("class", arrow.dictionary(arrow.int32(), arrow.string())),
        ("latent", arrow.int32()),
        *((name, arrow.float32()) for name in _NUMBERS),
    ]
)

# Shares are few numbers, and latents ascend: half the bytes and half the time of the defaults.
_ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["class", "share_of_images", "share_positive"],
    "column_encoding": {"latent": "DELTA_BINARY_PACKED"},
}


def reliance_table(reliance: Reliance, top: int) -> str:
    """CSV, `top` lines per class: the largest mean attributions, negative ones among them."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["class", "rank", "latent", *_NUMBERS])
    n_listed = min(top, reliance.mean_attribution.shape[1])
    for number, name in enumerate(reliance.origin.class_names):
        columns = _read_class(reliance, number)
        order = np.argsort(-np.abs(columns[0]), kind="stable")[:n_listed]
        for rank, latent in enumerate(order.tolist(), start=1):
            cells = ["" if np.isnan(each[latent]) else f"{each[latent]:.6g}" for each in columns]
            writer.writerow([name, rank, latent, *cells])
    return file.getvalue()


def write_reliance_parquet(reliance: Reliance, path: Path) -> None:
    """Write the long table, whole or not at all; memory for one class at a time."""
    names = arrow.array(reliance.origin.class_names, arrow.string())
    described = {name: json.dumps(value) for name, value in asdict(reliance.origin).items()}
    schema = _COLUMNS.with_metadata({f"clipattr.{name}": text for name, text in described.items()})
    with (
        atomic_file(path) as file,
        parquet.ParquetWriter(file, schema, **_ENCODING) as writer,
    ):
        for number in range(len(names)):
            columns = _read_class(reliance, number)
            fired = np.flatnonzero(columns[1])
            of_class = np.full(len(fired), number, dtype=np.int32)
            data = [
                arrow.DictionaryArray.from_arrays(of_class, names),
                arrow.array(fired.astype(np.int32)),
                *(arrow.array(each[fired], arrow.float32(), from_pandas=True) for each in columns),
            ]
            batch = arrow.record_batch(data, schema=schema)
            writer.write_batch(batch, row_group_size=max(1, len(fired)))


def _read_class(reliance: Reliance, number: int) -> list[np.ndarray]:
    """The three numbers of every latent; nan where there is none."""
    share = reliance.share_of_images
    rows = [
        reliance.mean_attribution[number],
        share if share.ndim == 1 else share[number],
        torch.full_like(reliance.mean_attribution[number], torch.nan)
        if reliance.share_positive is None
        else reliance.share_positive[number],
    ]
    return [row.cpu().float().numpy() for row in rows]

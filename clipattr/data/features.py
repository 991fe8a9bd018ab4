"""Activations at a site, written once and read by every later job: CLIP runs once per image.

One small WebDataset shard per image shard, in a folder named by the fingerprint of what it was made
from (weights, site, preprocessing, images). A shard has its name only when it is complete, so a
killed run goes on with the first missing one.
"""

import hashlib
import io
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from webdataset.writer import TarWriter

from clipattr.atomic import atomic_file
from clipattr.data.images import Preprocess, image_loader
from clipattr.data.shards import BadSample, Sample, check_bad, fingerprint, index_shards
from clipattr.errors import ConfigError, DataError


class FeatureStore(NamedTuple):
    """Rows x at the site; row r belongs to samples[image_rows[r]]."""

    x: Float[Tensor, "row model"]
    image_rows: Int[Tensor, " row"]
    bad: list[BadSample]
    fingerprint: str


def cache_features(
    samples: list[Sample],
    prefix: Callable[[Float[Tensor, "batch channel height width"]], Float[Tensor, "batch model"]],
    preprocess: Preprocess,
    *,
    made_from: dict[str, object],
    folder: Path,
    batch_size: int,
    workers: int,
    max_bad_fraction: float,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> FeatureStore:
    """Read the cached rows of the samples, running `prefix` on the shards that are not there yet.

    Args:
        samples: images, grouped by shard as `index_shards` returns them.
        prefix: images -> x, without gradient.
        preprocess: the model's own.
        made_from: what decides the values besides the images: weights hash, site.
        folder: of all caches.
        batch_size: images per forward.
        workers: decoding processes.
        max_bad_fraction: share of broken images above which the run stops.
        device: where prefix runs.
        progress: show a bar.
    """
    identity = made_from | {"preprocess": str(preprocess), "images": fingerprint(samples)}
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.shard)]
    # The times say when a file was replaced by one of the same size. They decide which cache is
    # read, but are no part of the fingerprint: the same data have the same on every machine.
    times = [group[0].shard.stat().st_mtime_ns for group in groups]
    store = folder / _hash(identity | {"times": times})[:16]
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache={str(folder)!r}: cannot be made: {error}") from None
    paths = [store / f"{number:06d}.tar" for number in range(len(groups))]
    missing = [pair for pair in zip(paths, groups, strict=True) if not pair[0].exists()]
    bad: list[BadSample] = []
    for path, group in tqdm(
        missing, desc="activations", unit="shard", disable=not progress or not missing
    ):
        loader = image_loader(group, preprocess, batch_size=batch_size, workers=workers)
        x, rows, found = _run_prefix(loader, prefix, device)
        bad += found
        # Before the shard is kept: images that stop the run will be repaired and read again.
        check_bad(bad, len(samples), max_bad_fraction)
        _write_shard(path, x, rows, found)
    return _read_store(samples, paths, _hash(identity), max_bad_fraction)


def _hash(identity: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _run_prefix(
    loader: torch.utils.data.DataLoader,
    prefix: Callable[[Tensor], Tensor],
    device: torch.device | str,
) -> tuple[Tensor, Tensor, list[BadSample]]:
    rows: list[Tensor] = []
    x: list[Tensor] = []
    bad: list[BadSample] = []
    with torch.no_grad():
        for batch in loader:
            bad.extend(batch.bad)
            if len(batch.rows):
                rows.append(batch.rows)
                x.append(prefix(batch.images.to(device)).float().cpu())
    if not x:  # `_read_store` judges whether so many may be broken
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), bad
    return torch.cat(x), torch.cat(rows), bad


def _write_shard(path: Path, x: Tensor, rows: Tensor, bad: list[BadSample]) -> None:
    sample: dict[str, object] = {
        "__key__": path.stem,
        "x.npy": _npy(x.numpy()),
        "rows.npy": _npy(rows.numpy()),
        "bad.json": json.dumps(bad).encode(),
    }
    with (
        atomic_file(path) as file,
        TarWriter(file, encoder=False, mtime=0, user="clipattr", group="clipattr") as writer,
    ):
        writer.write(sample)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_store(
    samples: list[Sample], paths: list[Path], made_from: str, max_bad_fraction: float
) -> FeatureStore:
    x: list[Tensor] = []
    rows: list[Tensor] = []
    bad: list[BadSample] = []
    first_row = 0
    for block, (_, group) in zip(
        index_shards(paths), groupby(samples, key=lambda sample: sample.shard), strict=True
    ):
        x.append(torch.from_numpy(np.load(io.BytesIO(block.read("x.npy")), allow_pickle=False)))
        local = np.load(io.BytesIO(block.read("rows.npy")), allow_pickle=False)
        rows.append(torch.from_numpy(local) + first_row)
        bad.extend(BadSample(*entry) for entry in json.loads(block.read("bad.json")))
        first_row += sum(1 for _ in group)
    check_bad(bad, len(samples), max_bad_fraction)
    x = [block for block in x if len(block)]
    if not x:
        raise DataError(f"none of the {len(samples)} images can be decoded")
    return FeatureStore(torch.cat(x), torch.cat(rows), bad, made_from)

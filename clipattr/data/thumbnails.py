"""Small pictures of chosen images, as files: what a gallery shows.

Rows name the images, and the index knows where each of them lies in its shard, so that no others
are read. A page then refers to `<folder>/<row // 1000>/<row>.jpg`.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clipattr.atomic import atomic_file, sweep_temporary, write_text
from clipattr.data.images import (
    DECODE_ERRORS,
    Samples,
    Size,
    decode_image,
    describe_error,
    read_image,
    undecodable,
)
from clipattr.data.shards import BadSample
from clipattr.errors import DataError

# A folder of a file system holds a thousand names well, and a million badly.
PER_FOLDER = 1000
_MARK = "thumbnails.json"
# Rows that are handed to the threads at a time.
_BLOCK = 1024


class Thumbnails(NamedTuple):
    """What became of the rows: how many files are new, how many were there, and what is broken."""

    n_written: int
    n_present: int
    bad: dict[int, BadSample]
    """by row; they have no file"""


def thumbnail_name(row: int) -> str:
    """The path of a row's file within the folder, as a page writes it."""
    return f"{row // PER_FOLDER}/{row}.jpg"


def write_thumbnails(
    samples: Samples,
    rows: Int[Tensor, "*chosen"] | Iterable[int],
    folder: Path,
    *,
    made_from: str,
    size: int = 112,
    quality: int = 85,
    threads: int = 4,
    progress: bool = True,
) -> Thumbnails:
    """Decode the images of the rows, each once, and write those that are not there yet.

    A broken image has no file and is reported. A killed call goes on where it was.

    Args:
        samples: a `ShardIndex`, local or remote, or a list.
        rows: in any order, also repeatedly; -1, which stands for no example, is left out.
        folder: of these thumbnails alone.
        made_from: what the rows are rows of: the fingerprint of the index.
        size: of the longer side, in pixels; smaller pictures are not enlarged.
        quality: of the JPEG files.
        threads: that read and decode; remote shards gain by more.
        progress: show a bar.

    Raises:
        DataError: for a row that there is not, and a folder with thumbnails of other images.
        TransferError: when a remote shard cannot be read: no image is broken then.
    """
    wanted = _find_rows(rows, len(samples))
    _mark(folder, {"made_from": made_from, "size": size, "quality": quality})
    missing = [row for row in wanted if not (folder / thumbnail_name(row)).exists()]
    bad: dict[int, BadSample] = {}
    write = partial(_write, samples, folder, size=size, quality=quality)
    hidden = not progress or not missing
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="thumbnails") as pool,
        tqdm(desc="thumbnails", unit="image", total=len(missing), disable=hidden, delay=2) as bar,
    ):
        for start in range(0, len(missing), _BLOCK):
            block = missing[start : start + _BLOCK]
            for row, problem in zip(block, pool.map(write, block), strict=True):
                bar.update()
                if problem is not None:
                    bad[row] = problem
    return Thumbnails(len(missing) - len(bad), len(wanted) - len(missing), bad)


def read_thumbnails(
    folder: Path, rows: Iterable[int], *, made_from: str
) -> dict[int, UInt8[np.ndarray, "height width 3"]]:
    """The pictures of the rows.

    Raises:
        DataError: for a row that has no file, and a folder with thumbnails of other images.
    """
    mark = folder / _MARK
    if not mark.exists():
        raise DataError(f"{folder}: holds no {_MARK}, so there are no thumbnails")
    found = json.loads(mark.read_text(encoding="utf-8"))["made_from"]
    if found != made_from:
        raise DataError(f"{folder}: holds thumbnails of the images {found}, expected {made_from}")
    pictures: dict[int, np.ndarray] = {}
    for row in rows:
        path = folder / thumbnail_name(row)
        try:
            with Image.open(path, formats=["JPEG"]) as picture:
                pictures[row] = np.asarray(picture.convert("RGB"))
        except DECODE_ERRORS as error:
            raise DataError(f"{path}: cannot be read: {describe_error(error)}") from error
    return pictures


def _find_rows(rows: Tensor | Iterable[int], n_samples: int) -> list[int]:
    found = torch.as_tensor(list(rows) if not isinstance(rows, Tensor) else rows, dtype=torch.int64)
    distinct = found.unique()
    if len(distinct) and (distinct[0] < -1 or distinct[-1] >= n_samples):
        raise DataError(
            f"rows of thumbnails lie in [{distinct[0].item()}, {distinct[-1].item()}]; "
            f"the set has {n_samples} images"
        )
    return distinct[distinct >= 0].tolist()


def _mark(folder: Path, settings: dict[str, object]) -> None:
    """Rows are numbers: in the folder of another set they would name other pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / _MARK
    asked = json.dumps(settings)
    if not mark.exists():
        if any(folder.glob("*/*.jpg")):
            raise DataError(
                f"{folder} holds .jpg files, but no {_MARK}: choose a folder of its own"
            )
        write_text(mark, asked)
    found = mark.read_text(encoding="utf-8")
    if found != asked:
        raise DataError(
            f"{folder} holds thumbnails of {found}, as {_MARK} says; asked for are {asked}: remove "
            "the folder, or choose another one"
        )
    for each in folder.iterdir():
        if each.is_dir():
            sweep_temporary(each)


def _write(
    samples: Samples, folder: Path, row: int, *, size: int, quality: int
) -> BadSample | None:
    sample = samples[row]
    if sample.image_field is None:
        reason = f"lacks an image; has {', '.join(sorted(sample.fields))}"
        return BadSample(str(sample.shard), sample.key, reason)
    content = read_image(sample)
    if isinstance(content, BadSample):
        return content
    try:
        image = decode_image(content, partial(_needed, longest=size))
        small = image.resize(fit(image.size, size), Image.Resampling.LANCZOS)
    except DECODE_ERRORS as error:
        return undecodable(sample, describe_error(error))
    with atomic_file(folder / thumbnail_name(row)) as file:
        # Colour at half the resolution, JPEG's usual way, would smear pictures that are so small.
        small.save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return None


def fit(size: Size, longest: int) -> Size:
    """The size of a picture whose longer side is made `longest`, if it is larger."""
    scale = min(1.0, longest / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def _needed(size: Size, *, longest: int) -> Size:
    """A JPEG is decoded at no less than twice the size: squares of its pixels are averaged."""
    return fit(size, 2 * longest)

"""Rows on their way into an activation store: from batches to chunks, and from chunks to files."""

import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from clipattr.atomic import atomic_file, write_text
from clipattr.data.columns import Column, as_numpy
from clipattr.data.shards import END_MARKER, BadSample
from clipattr.data.store import ID_COLUMNS, read_json
from clipattr.errors import DataError

TAR_BLOCK = 512


class Layout(NamedTuple):
    """Which images and rows each chunk holds: a pure function of these numbers and the chunk's own.

    `order` is "mixed", or "source" to keep the order of the source.
    """

    n_images: int
    n_chunks: int
    order: str
    seed: int
    block_rows: int

    def images(self) -> Int[np.ndarray, " image"]:
        """All images, in the order of the files."""
        everything = np.arange(self.n_images)
        return everything if self.order == "source" else self._shuffled(everything, 0)

    def bounds(self, chunk: int) -> tuple[int, int]:
        """Which of `images` a chunk holds; chunks differ by one image at most."""
        first, last = self.n_images * chunk, self.n_images * (chunk + 1)
        return first // self.n_chunks, last // self.n_chunks

    def blocks(self, chunk: int, n_rows: int) -> list[Int[np.ndarray, " row"]]:
        """The rows of a chunk, block by block; blocks differ by one row at most."""
        if n_rows == 0:
            return []
        rows = np.arange(n_rows)
        if self.order == "mixed":
            rows = self._shuffled(rows, 1 + chunk)
        return np.array_split(rows, -(-n_rows // self.block_rows))

    def _shuffled(self, rows: Int[np.ndarray, " row"], stream: int) -> Int[np.ndarray, " row"]:
        return np.random.Generator(np.random.Philox(key=[self.seed, stream])).permutation(rows)


class ReadBatch(NamedTuple):
    """What was read for the next few images that were asked for.

    Attributes:
        images: those that could be read, in the order asked for, as rows of the source.
        values: store name -> column -> [image, token, ...], or [image, ...] with one token each.
            A column `tokens` numbers the tokens where 0, 1, ... would be wrong.
        bad: the others, in the same order.
    """

    images: Int[Tensor, " image"]
    values: Mapping[str, Mapping[str, Tensor]]
    bad: list[BadSample]


Read = Callable[[Int[Tensor, " image"]], Iterable[ReadBatch]]


class Source:
    """The batches of `read`, to be taken in other portions than they come in."""

    def __init__(self, read: Read, wanted: Int[np.ndarray, " image"]) -> None:
        self.wanted = wanted
        self.batches = iter(read(torch.from_numpy(wanted)))
        self.n_taken = 0
        self.batch = ReadBatch(torch.zeros(0, dtype=torch.int64), {}, [])

    def take(self, n_images: int) -> Iterator[ReadBatch]:
        """The next images that were asked for."""
        last = self.n_taken + n_images
        while self.n_taken < last:
            n_here = len(self.batch.images) + len(self.batch.bad)
            if n_here == 0:
                batch = next(self.batches, None)
                assert batch is not None, f"`read` ended {last - self.n_taken} images too early"
                self.batch = batch
                continue
            asked = self.wanted[self.n_taken : min(last, self.n_taken + n_here)]
            good = asked[np.isin(asked, self.batch.images.numpy())]
            n_good, n_bad = len(good), len(asked) - len(good)
            is_same = np.array_equal(good, self.batch.images[:n_good].numpy())
            assert is_same, "`read` gave other images than it was asked for, or another order"
            self.n_taken += len(asked)
            yield _cut(self.batch, slice(n_good), slice(n_bad))
            self.batch = _cut(self.batch, slice(n_good, None), slice(n_bad, None))


def _cut(batch: ReadBatch, good: slice, bad: slice) -> ReadBatch:
    values = {
        store: {name: rows[good] for name, rows in columns.items()}
        for store, columns in batch.values.items()
    }
    return ReadBatch(batch.images[good], values, batch.bad[bad])


class OpenChunk:
    """Rows of one store on their way to the disk."""

    def __init__(
        self, folder: Path, number: int, columns: Mapping[str, Column], n_images: int, tokens: int
    ) -> None:
        self.folder = folder
        self.number = number
        self.tokens = tokens
        self.columns = {**columns, **ID_COLUMNS}
        self.rows = {name: column.empty(n_images * tokens) for name, column in self.columns.items()}
        self.n_rows = 0
        self.bad: list[BadSample] = []

    def add(self, images: Int[Tensor, " image"], values: Mapping[str, Tensor]) -> None:
        """Append the rows of some images."""
        stop = self.n_rows + len(images) * self.tokens
        ids = {
            "images": images[:, None].expand(-1, self.tokens),
            "tokens": torch.arange(self.tokens).expand(len(images), -1),
        }
        for name, rows in self.rows.items():
            found = values[name] if name in values else ids[name]
            new = rows[self.n_rows : stop]
            new.copy_(found.reshape(new.shape))
            if new.is_floating_point() and len(new) and not _is_finite(new):
                raise self._not_finite(name, images, new)
        self.n_rows = stop

    def _not_finite(self, name: str, images: Tensor, rows: Tensor) -> DataError:
        is_finite = rows.isfinite().reshape(len(images), -1).all(dim=1)
        return DataError(
            f"{self.folder}: {name} of image {int(images[~is_finite][0])} of the source is not "
            f"finite as {self.columns[name].dtype}: the model gives nan or infinity, or a dtype "
            "with a larger range is needed (bfloat16, float32)"
        )

    def write(self, layout: Layout) -> None:
        """Write the tar, and then its sidecar: without it the chunk does not exist."""
        blocks = layout.blocks(self.number, self.n_rows)
        offsets: dict[str, list[int]] = {name: [] for name in self.columns}
        crc32: dict[str, list[int]] = {name: [] for name in self.columns}
        path = self.folder / tar_name(self.number)
        with atomic_file(path) as file:
            for number, chosen in enumerate(blocks):
                for name, column in self.columns.items():
                    rows = self.rows[name].index_select(0, torch.from_numpy(chosen))
                    member = f"{self.number:06d}-{number:06d}.{name}.npy"
                    data = as_numpy(rows).reshape(-1)
                    offsets[name].append(
                        _write_member(file, member, column.npy_header(len(chosen)), data)
                    )
                    crc32[name].append(zlib.crc32(data.data))
            file.write(END_MARKER)
            size = file.tell()
        sidecar = {
            "file": path.name,
            "size": size,
            "rows": [len(chosen) for chosen in blocks],
            "offsets": offsets,
            "crc32": crc32,
            "bad": self.bad,
        }
        write_text(self.folder / sidecar_name(self.number), json.dumps(sidecar) + "\n")


def tar_name(chunk: int) -> str:
    """The file of a chunk."""
    return f"act-{chunk:06d}.tar"


def sidecar_name(chunk: int) -> str:
    """The file that says what the file of a chunk holds."""
    return f"act-{chunk:06d}.json"


def has_chunk(folder: Path, chunk: int) -> bool:
    """Whether a chunk is complete."""
    sidecar, path = folder / sidecar_name(chunk), folder / tar_name(chunk)
    if not (sidecar.exists() and path.exists()):
        return False
    return path.stat().st_size == read_json(sidecar)["size"]


def _is_finite(rows: Tensor) -> bool:
    # nan is the smallest and the largest of its like; 20 times as fast as looking at each number.
    return bool(torch.stack(torch.aminmax(rows)).isfinite().all())


def _write_member(
    file: BinaryIO, name: str, header: bytes, data: Shaped[np.ndarray, " number"]
) -> int:
    """Append a member to a tar; where its content begins."""
    info = tarfile.TarInfo(name)
    info.size = len(header) + data.nbytes
    info.mode = 0o444
    info.uname = info.gname = "clipattr"
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(header)
    file.write(data.data.cast("B"))
    file.write(bytes(-info.size % TAR_BLOCK))
    return offset

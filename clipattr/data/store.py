"""Cached rows on disk: activations at a site, or codes, with the image and the token of each row.

A store is a folder. `act-000000.tar`, ... are ordinary WebDataset shards whose samples are blocks
of some thousand rows: one .npy per column (`{key}.x.npy`), and `{key}.images.npy` and
`{key}.tokens.npy`, which say whose row it is. Beside each lies `act-000000.json` with its offsets
and checksums; `keys.txt` names the images, `bad_samples.jsonl` those that could not be read.
`store.json` is written last: without it there is no store. `clipattr.data.writer` writes one.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from clipattr.data.columns import NPY_HEADER, Column, as_numpy, read_into
from clipattr.data.shards import BadSample
from clipattr.errors import DataError

FORMAT = 1
STORE, PLAN, KEYS, BAD = "store.json", "plan.json", "keys.txt", "bad_samples.jsonl"
REWRITE = f"delete it, and {STORE} beside it, to have it written again"

# Every store has these two: the row of the image in the source, and which of its tokens.
ID_COLUMNS = {"images": Column("int32", None), "tokens": Column("int16", None)}


class ActivationStore:
    """A finished store, opened to read. Row r is the r-th over all blocks, in the order of files.

    Attributes:
        folder: where it lies.
        fingerprint: what decides the values, as its writer gave it.
        columns: name -> dtype and width, with `images` and `tokens`.
        starts: first row of each block, and the number of rows at the end.
        tokens: rows per image.
        n_images: images of the source, with the bad ones.
        order: "mixed", or "source" where rows stand in the order of the source.
        index_hash: sha256 of what decides which row is where: the state of a stream depends on it.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: dict[str, object] = content["fingerprint"]
        self.columns = read_columns(content["columns"])
        self.tokens: int = content["tokens"]
        self.n_images: int = content["n_images"]
        self.order: str = content["order"]
        self._keys_sha256: str = content["keys_sha256"]
        chunks = content["chunks"]
        self._files = [folder / chunk["file"] for chunk in chunks]
        rows = [n_rows for chunk in chunks for n_rows in chunk["rows"]]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64)
        self._chunk_of = np.repeat(np.arange(len(chunks)), [len(chunk["rows"]) for chunk in chunks])
        self._offsets = {name: _join(chunks, "offsets", name) for name in self.columns}
        self._crc32 = {name: _join(chunks, "crc32", name) for name in self.columns}
        ids = {name: self._crc32[name].tolist() for name in ID_COLUMNS}
        layout = [self.fingerprint, content["columns"], self.n_images, rows, ids]
        self.index_hash = hash_json(layout)

    @classmethod
    def open(cls, folder: Path, expected: Mapping[str, object] | None = None) -> "ActivationStore":
        """Open a finished store; one made from something else than `expected`, or cut, is refused.

        Contents are not read: bit rot is found by `verify`.
        """
        content = read_json(folder / STORE)
        check_format(folder / STORE, content)
        if hash_json({**content, "sha256": None}) != content.get("sha256"):
            raise DataError(f"{folder / STORE}: is damaged, its own checksum does not fit")
        if expected is not None:
            wanted = json.loads(json.dumps(expected))
            check_same(folder, "fingerprint", content["fingerprint"], wanted)
        for chunk in content["chunks"]:
            path = folder / chunk["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != chunk["size"]:
                raise DataError(f"{path}: has {size} of its {chunk['size']} bytes; {REWRITE}")
        return cls(folder, content)

    @property
    def n_rows(self) -> int:
        """All rows."""
        return int(self.starts[-1])

    @property
    def n_blocks(self) -> int:
        """All blocks."""
        return len(self.starts) - 1

    @property
    def chunk_starts(self) -> Int[np.ndarray, " border"]:
        """First row of each file, and the number of rows at the end."""
        blocks = np.searchsorted(self._chunk_of, np.arange(len(self._files) + 1))
        return self.starts[blocks]

    @property
    def n_bytes(self) -> int:
        """What its shards take on the disk."""
        return sum(path.stat().st_size for path in self._files)

    @cached_property
    def keys(self) -> list[str]:
        """The keys of all source images: `keys[images[r]]` is the sample of row r."""
        content = _read_bytes(self.folder / KEYS)
        if hashlib.sha256(content).hexdigest() != self._keys_sha256:
            raise DataError(f"{self.folder / KEYS}: is damaged, its checksum does not fit")
        return content.decode("utf-8", "surrogateescape").split("\n")[: self.n_images]

    @cached_property
    def bad(self) -> list[BadSample]:
        """The images that could not be read; they have no rows."""
        lines = _read_bytes(self.folder / BAD).splitlines()
        return [BadSample(**json.loads(line)) for line in lines]

    def block(self, number: int) -> dict[str, Shaped[np.ndarray, "row ..."]]:
        """The columns of a block as read-only views of the file: nothing is copied.

        bfloat16 comes as uint16, its bits.
        """
        n_rows = int(self.starts[number + 1] - self.starts[number])
        path = self._files[self._chunk_of[number]]
        content = np.memmap(path, np.uint8, "r")
        return {
            name: column.view_npy(path, content, int(self._offsets[name][number]), n_rows)
            for name, column in self.columns.items()
        }

    def load(self, name: str = "x") -> Shaped[Tensor, "row ..."]:
        """A whole column, in memory."""
        out = self.column(name).empty(self.n_rows)
        self.read_run(name, 0, out)
        return out

    def read(self, rows: Int[Tensor, " row"], name: str = "x") -> Shaped[Tensor, "row ..."]:
        """Any rows of a column, as often and in the order asked for."""
        column, wanted = self.column(name), rows.cpu().numpy()
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.n_rows:
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {self.n_rows}")
        out = column.empty(len(wanted))
        blocks = np.searchsorted(self.starts, wanted, side="right") - 1
        into = as_numpy(out)
        for number in np.unique(blocks):
            chosen = np.flatnonzero(blocks == number)
            into[chosen] = self.block(int(number))[name][wanted[chosen] - self.starts[number]]
        return out

    def rows_by_image(self) -> Int[Tensor, " row"]:
        """All rows in the order of the source: by image, then by token."""
        order = np.lexsort((self.load("tokens").numpy(), self.load("images").numpy()))
        return torch.from_numpy(order)

    def read_run(self, name: str, start: int, out: Shaped[Tensor, "row ..."]) -> None:
        """Fill `out` with the rows start, start + 1, ... of a column; they may span blocks.

        Plain reads and no memory map: a file that was cut is an error and not a signal that kills
        the process, and no file stays open however many there are.
        """
        column, stop = self.column(name), start + len(out)
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        row = start
        while row < stop:
            end = min(stop, int(self.starts[number + 1]))
            offset = int(self._offsets[name][number]) + NPY_HEADER
            offset += (row - int(self.starts[number])) * column.row_bytes
            read_into(self._files[self._chunk_of[number]], offset, out[row - start : end - start])
            number, row = number + 1, end

    def verify(self) -> None:
        """Read everything and compare with the checksums; the first damage is named."""
        assert len(self.keys) == self.n_images
        for chunk, path in enumerate(self._files):
            numbers = np.flatnonzero(self._chunk_of == chunk).tolist()
            _check_members(
                path,
                {
                    f"{chunk:06d}-{place:06d}.{name}.npy": int(self._offsets[name][number])
                    for place, number in enumerate(numbers)
                    for name in self.columns
                },
            )
            for number in numbers:
                for name, view in self.block(number).items():
                    if zlib.crc32(view.data) != self._crc32[name][number]:
                        raise DataError(
                            f"{path}: column {name!r} of block {number} is damaged, at byte "
                            f"{self._offsets[name][number]} or behind; {REWRITE}"
                        )

    def column(self, name: str) -> Column:
        """Dtype and width of a column."""
        if name not in self.columns:
            raise DataError(f"{self.folder}: has no column {name!r}, only {list(self.columns)}")
        return self.columns[name]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: does not exist: no finished store is there") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _check_members(path: Path, expected: dict[str, int]) -> None:
    """The members of a tar, as everybody else will read it."""
    try:
        with tarfile.open(path, "r:") as archive:
            found = {member.name: member.offset_data for member in archive}
    except tarfile.TarError as error:
        raise DataError(f"{path}: is damaged: {error}; {REWRITE}") from error
    if found != expected:
        first = min(offset for _, offset in found.items() ^ expected.items())
        raise DataError(f"{path}: is damaged before byte {first}; {REWRITE}")


def read_columns(content: Mapping[str, Any]) -> dict[str, Column]:
    """The columns of a JSON file, with the two that every store has."""
    return {name: Column(*found) for name, found in content.items()} | ID_COLUMNS


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a store."""
    content = _read_bytes(path)
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: is damaged: {error}") from error


def hash_json(content: object) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_format(path: Path, content: Mapping[str, Any]) -> None:
    """Raise DataError for a store of another version."""
    if content.get("format") != FORMAT:
        raise DataError(
            f"{path}: has format {content.get('format')!r}, this version reads {FORMAT}"
        )


def check_same(folder: Path, name: str, found: object, wanted: object) -> None:
    """Raise DataError naming the first differing field and both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else key
            check_same(folder, inner, found.get(key), wanted.get(key))
    elif found != wanted:
        raise DataError(
            f"{folder}: was made with {name}={found!r}, asked for is {wanted!r}; use another "
            "folder, or delete this one"
        )


def _join(chunks: list[dict[str, Any]], field: str, name: str) -> Int[np.ndarray, " block"]:
    return np.array([value for chunk in chunks for value in chunk[field][name]], dtype=np.int64)

"""How the numbers of a row lie in a file: dtype, width, and the .npy members that hold them.

The header of every member takes the same 128 bytes, so that any row is found without reading it,
and only the dtypes listed here exist: nothing is ever unpickled.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from clipattr.errors import DataError

NPY_HEADER = 128
DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "float16": (torch.float16, "<f2"),
    "bfloat16": (torch.bfloat16, "<u2"),  # numpy has none: stored as its bits
    "float32": (torch.float32, "<f4"),
    "int16": (torch.int16, "<i2"),
    "int32": (torch.int32, "<i4"),
    "int64": (torch.int64, "<i8"),
}


class Column(NamedTuple):
    """One field of every row: `width` numbers of a dtype in `DTYPES`; None means a single one."""

    dtype: str
    width: int | None

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch names it."""
        return DTYPES[self.dtype][0]

    @property
    def numpy_dtype(self) -> np.dtype:
        """As it lies in the file."""
        return np.dtype(DTYPES[self.dtype][1])

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return self.numpy_dtype.itemsize * (self.width or 1)

    def shape(self, n_rows: int) -> tuple[int, ...]:
        """The shape of that many rows."""
        return (n_rows,) if self.width is None else (n_rows, self.width)

    def empty(self, n_rows: int, *, pin_memory: bool = False) -> Shaped[Tensor, "row ..."]:
        """Room for that many rows."""
        return torch.empty(self.shape(n_rows), dtype=self.torch_dtype, pin_memory=pin_memory)

    def npy_header(self, n_rows: int) -> bytes:
        """What a .npy file of that many rows begins with (version 1.0 of the format)."""
        text = (
            f"{{'descr': '{self.numpy_dtype.str}', 'fortran_order': False, "
            f"'shape': {self.shape(n_rows)}, }}"
        )
        start = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
        return start + text.ljust(NPY_HEADER - 11).encode() + b"\n"

    def view_npy(
        self, path: Path, content: UInt8[np.ndarray, " byte"], offset: int, n_rows: int
    ) -> Shaped[np.ndarray, "row ..."]:
        """The array of the .npy member that begins at `offset` of a mapped file."""
        first = offset + NPY_HEADER
        found = content[offset:first].tobytes()
        if found != self.npy_header(n_rows):
            raise DataError(
                f"{path}: at byte {offset} no .npy member with {n_rows} rows of {self} begins, but "
                f"{found[:NPY_HEADER]!r}"
            )
        rows = content[first : first + n_rows * self.row_bytes]
        return rows.view(self.numpy_dtype).reshape(self.shape(n_rows))


def as_numpy(rows: Shaped[Tensor, "row ..."]) -> Shaped[np.ndarray, "row ..."]:
    """The memory of a tensor, as it lies in the file."""
    return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def read_into(path: Path, offset: int, out: Shaped[Tensor, "row ..."]) -> None:
    """Fill `out` with the bytes of a file from `offset` on."""
    memory = as_numpy(out).data.cast("B")
    n_read = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while n_read < len(memory):
                n_new = file.readinto(memory[n_read:])
                if not n_new:
                    raise DataError(f"{path}: is cut before byte {offset + len(memory)}")
                n_read += n_new
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error

"""Small activation stores whose every number is known."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipattr.data.chunks import Read, ReadBatch
from clipattr.data.columns import Column
from clipattr.data.shards import BadSample
from clipattr.data.store import ActivationStore
from clipattr.data.writer import StorePlan, write_stores

WIDTH = 5
FINGERPRINT: dict[str, object] = {"weights": "w", "site": {"layer": -1, "tokens": "all"}}


def keys_of(n_images: int) -> list[str]:
    return [f"folder/{image:04d}" for image in range(n_images)]


def values_of(images: Tensor, tokens: int, width: int = WIDTH) -> Tensor:
    """[image, token, width], exact in float16 for up to 200 images and 10 tokens."""
    number = images[:, None, None] * 10 + torch.arange(tokens)[:, None]
    sign = torch.tensor([1.0, -1.0])[torch.arange(width) % 2]
    return number.float() * sign


def reader(
    tokens: int = 1, batch: int = 7, bad: tuple[int, ...] = (), asked: list[int] | None = None
) -> Read:
    """What stands for decoding and the tower; `asked` collects the images it was asked for."""

    def read(images: Tensor) -> Iterator[ReadBatch]:
        for part in images.split(batch):
            if asked is not None:
                asked.extend(part.tolist())
            good = part[[int(image) not in bad for image in part]]
            broken = [
                BadSample("a.tar", f"{image:04d}", "broken")
                for image in part.tolist()
                if image in bad
            ]
            yield ReadBatch(good, {"s": {"x": values_of(good, tokens)}}, broken)

    return read


def plan_of(
    folder: Path, *, tokens: int = 1, dtype: str = "float32", width: int = WIDTH
) -> StorePlan:
    return StorePlan(folder, FINGERPRINT, {"x": Column(dtype, width)}, tokens)


def write(
    folder: Path,
    n_images: int = 40,
    *,
    tokens: int = 1,
    dtype: str = "float32",
    read: Read | None = None,
    chunk_images: int = 12,
    block_rows: int = 5,
    order: str = "mixed",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_bad_fraction: float = 0.0,
) -> ActivationStore:
    """With blocks of 5 rows in chunks of up to 12 images."""
    return write_stores(
        {"s": plan_of(folder, tokens=tokens, dtype=dtype)},
        keys_of(n_images),
        read or reader(tokens),
        order=order,
        seed=seed,
        chunk_images=chunk_images,
        block_rows=block_rows,
        rank=rank,
        world_size=world_size,
        max_bad_fraction=max_bad_fraction,
    )["s"]


def check_contents(store: ActivationStore, tokens: int, images: list[int]) -> None:
    """Every token of the given images has exactly one row, and it is right."""
    x, owners, numbers = (store.load(name) for name in ("x", "images", "tokens"))
    pairs = sorted(zip(owners.tolist(), numbers.tolist(), strict=True))
    assert pairs == [(image, token) for image in images for token in range(tokens)]
    expected = values_of(owners.long(), tokens)[torch.arange(len(x)), numbers.long()]
    assert torch.equal(x.float(), expected)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ragged_starts(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def store_of(rows: Tensor, folder: Path) -> ActivationStore:
    """A store of these rows, one for each image."""

    def read(images: Tensor) -> Iterator[ReadBatch]:
        yield ReadBatch(images, {"s": {"x": rows[images]}}, [])

    plan = plan_of(folder, width=rows.shape[1])
    return write_stores({"s": plan}, keys_of(len(rows)), read)["s"]

"""Activations of image shards, cached in a store: CLIP runs once per image.

The folder is named by the fingerprint of what the rows are made from (weights, site, precision,
preprocessing, images), so another model or site never meets them. Mixed when they are written, the
same rows serve training in any order and evaluation in the order of the shards.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.data.chunks import ReadBatch
from clipattr.data.columns import Column
from clipattr.data.images import ImageBatch, image_loader
from clipattr.data.index import ShardIndex
from clipattr.data.pixels import Pixels
from clipattr.data.shards import version_of
from clipattr.data.store import ActivationStore, hash_json
from clipattr.data.writer import StorePlan, write_stores

Encode = Callable[[Float[Tensor, "batch channel height width"]], Float[Tensor, "batch width"]]


class Ranks(NamedTuple):
    """The processes that write a store together."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], object] = lambda: None


class Features(NamedTuple):
    """All rows in memory, in the order of the shards: x[r] belongs to image `images[r]`."""

    x: Float[Tensor, "row width"]
    images: Int[Tensor, " row"]


def cache_activations(
    index: ShardIndex,
    encode: Encode,
    pixels: Pixels,
    *,
    made_from: dict[str, object],
    width: int,
    dtype: str,
    folder: Path,
    batch_size: int,
    workers: int,
    max_bad_fraction: float,
    device: torch.device | str = "cpu",
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool = True,
) -> ActivationStore:
    """The store of the images' activations; what is missing of it is written first.

    Args:
        index: of the images.
        encode: images -> x [batch, width], without gradient, on `device`.
        pixels: the model's own preprocessing.
        made_from: what decides the values besides the images: weights, site.
        width: of x.
        dtype: of the stored numbers: float32, float16 or bfloat16.
        folder: of all caches.
        batch_size: images per forward.
        workers: decoding processes.
        max_bad_fraction: share of broken images above which the run stops.
        device: where encode runs.
        ranks: the processes that share the work.
        progress: show a bar.
    """
    fingerprint = made_from | {"preprocess": pixels.fingerprint, "images": index.fingerprint}
    # Versions say when a shard was replaced by one of the same size. They decide which cache is
    # read, but are no part of the fingerprint: the same data have the same on every machine.
    versions = [version_of(shard) for shard in index.shards]
    name = hash_json(fingerprint | {"times": versions, "dtype": dtype})[:16]
    plan = StorePlan(folder / name, fingerprint, {"x": Column(dtype, width)})

    def read(images: Int[Tensor, " image"]) -> Iterator[ReadBatch]:
        chosen = index.select(images.numpy())
        loader = image_loader(chosen, pixels, batch_size=batch_size, workers=workers)
        return _encode_all(loader, images, pixels, encode, width, device)

    keys = [key.decode() for key in index.keys.tolist()]
    stores = write_stores(
        {"x": plan},
        keys,
        read,
        rank=ranks.rank,
        world_size=ranks.world_size,
        barrier=ranks.barrier,
        max_bad_fraction=max_bad_fraction,
        progress=progress and ranks.rank == 0,
    )
    return stores["x"]


@torch.no_grad()
def _encode_all(
    loader: Iterable[ImageBatch],
    images: Int[Tensor, " image"],
    pixels: Pixels,
    encode: Encode,
    width: int,
    device: torch.device | str,
) -> Iterator[ReadBatch]:
    for batch in loader:
        x = torch.zeros(0, width)
        if len(batch.rows):
            x = encode(pixels.normalise(batch.images.to(device))).float().cpu()
        yield ReadBatch(images[batch.rows], {"x": {"x": x}}, batch.bad)


def load_features(store: ActivationStore) -> Features:
    """Every row of a store with one row per image, in float32."""
    order = store.rows_by_image()
    return Features(store.load("x")[order].float(), store.load("images")[order].long())

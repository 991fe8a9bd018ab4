"""Activations of image shards, cached in stores: CLIP runs once per image, whatever is read of it.

The folder is named by the fingerprint of what the rows are made from (weights, site, precision,
preprocessing, images), so another model or site never meets them. Mixed when they are written, the
same rows serve training in any order and evaluation in the order of the shards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.data.chunks import ReadBatch
from clipattr.data.columns import Column
from clipattr.data.draw import draw_tokens
from clipattr.data.images import ImageBatch, image_loader
from clipattr.data.index import ShardIndex
from clipattr.data.pixels import Pixels
from clipattr.data.shards import version_of
from clipattr.data.store import ActivationStore, hash_json
from clipattr.data.writer import StorePlan, is_finished, write_stores

# (images, names of the sites that are missing) -> name -> [batch, width] or [batch, token, width].
Encode = Callable[
    [Float[Tensor, "batch channel height width"], Sequence[str]], Mapping[str, Tensor]
]


class Ranks(NamedTuple):
    """The processes that write a store together."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], object] = lambda: None
    local_world_size: int = 1
    """processes on this machine, which share its cores"""


class SiteRows(NamedTuple):
    """What is stored of every image at one site.

    Attributes:
        made_from: what decides the values besides the images and the drawing: weights, site.
        width: of x.
        tokens: of an image at the site.
        drawn: how many of them are kept, chosen by the image's key; None: all.
        beside: widths of further columns of the same rows, by the names under which `encode` gives
            them, such as another site with as many tokens.
    """

    made_from: Mapping[str, object]
    width: int
    tokens: int = 1
    drawn: int | None = None
    beside: Mapping[str, int] = MappingProxyType({})

    @property
    def widths(self) -> dict[str, int]:
        """Of all columns."""
        return {"x": self.width, **self.beside}


class Features(NamedTuple):
    """All rows in memory, in the order of the shards: x[r] belongs to image `images[r]`."""

    x: Float[Tensor, "row width"]
    images: Int[Tensor, " row"]


def cache_activations(
    index: ShardIndex,
    encode: Encode,
    pixels: Pixels,
    *,
    sites: Mapping[str, SiteRows],
    dtype: str,
    folder: Path,
    batch_size: int,
    workers: int,
    max_bad_fraction: float,
    device: torch.device | str = "cpu",
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool = True,
) -> dict[str, ActivationStore]:
    """The stores of the images' activations; what is missing is written first, in one pass.

    Args:
        index: of the images.
        encode: images and names of sites -> x of each, without gradient, on `device`. Called once
            for each batch, with the sites that are missing and what is stored beside them.
        pixels: the model's own preprocessing.
        sites: by the names that `encode` knows.
        dtype: of the stored numbers: float32, float16 or bfloat16.
        folder: of all caches.
        batch_size: images per forward.
        workers: decoding processes.
        max_bad_fraction: share of broken images above which the run stops.
        device: where encode runs.
        ranks: the processes that share the work.
        progress: show a bar.
    """
    plans = {name: _plan(index, pixels, rows, dtype, folder) for name, rows in sites.items()}
    # Another job may finish one in the meantime: then it is computed for nothing.
    missing = {name: sites[name] for name, plan in plans.items() if not is_finished(plan)}

    def read(images: Int[Tensor, " image"]) -> Iterator[ReadBatch]:
        chosen = index.select(images.numpy())
        loader = image_loader(chosen, pixels, batch_size=batch_size, workers=workers)
        return _encode_all(loader, images, pixels, encode, missing, Column(dtype, None), device)

    keys = [key.decode() for key in index.keys.tolist()]
    return write_stores(
        plans,
        keys,
        read,
        rank=ranks.rank,
        world_size=ranks.world_size,
        barrier=ranks.barrier,
        max_bad_fraction=max_bad_fraction,
        progress=progress and ranks.rank == 0,
    )


def _plan(index: ShardIndex, pixels: Pixels, rows: SiteRows, dtype: str, folder: Path) -> StorePlan:
    fingerprint = {
        **rows.made_from,
        "preprocess": pixels.fingerprint,
        "images": index.fingerprint,
    }
    if rows.drawn is not None:
        fingerprint["tokens_per_image"] = rows.drawn
    # Versions say when a shard was replaced by one of the same size. They decide which cache is
    # read, but are no part of the fingerprint: the same data have the same on every machine.
    versions = [version_of(shard) for shard in index.shards]
    name = hash_json(fingerprint | {"times": versions, "dtype": dtype})[:16]
    kept = rows.tokens if rows.drawn is None else rows.drawn
    columns = {column: Column(dtype, width) for column, width in rows.widths.items()}
    return StorePlan(folder / name, fingerprint, columns, kept)


@torch.no_grad()
def _encode_all(
    loader: Iterable[ImageBatch],
    images: Int[Tensor, " image"],
    pixels: Pixels,
    encode: Encode,
    sites: Mapping[str, SiteRows],
    column: Column,
    device: torch.device | str,
) -> Iterator[ReadBatch]:
    names = [name for site, rows in sites.items() for name in (site, *rows.beside)]
    for batch in loader:
        values = {
            site: {name: torch.zeros(0, width) for name, width in rows.widths.items()}
            for site, rows in sites.items()
        }
        if len(batch.rows):
            found = encode(pixels.normalise(batch.images.to(device)), names)
            for site, rows in sites.items():
                columns = {"x": found[site], **{name: found[name] for name in rows.beside}}
                values[site] = _keep(columns, rows, batch.keys, column.torch_dtype)
        yield ReadBatch(images[batch.rows], values, batch.bad)


def _keep(
    columns: Mapping[str, Float[Tensor, "batch *token _"]],
    rows: SiteRows,
    keys: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The columns of a batch; what is not stored is left on the device."""
    if rows.drawn is None:
        return {name: x.to("cpu", dtype) for name, x in columns.items()}
    tokens = draw_tokens(keys, rows.tokens, rows.drawn)
    chosen = {
        name: x.take_along_dim(tokens[:, :, None].to(x.device), dim=1).to("cpu", dtype)
        for name, x in columns.items()
    }
    return {**chosen, "tokens": tokens}


def load_features(store: ActivationStore) -> Features:
    """Every row of a store with one row per image, in float32."""
    order = store.rows_by_image()
    return Features(store.load("x")[order].float(), store.load("images")[order].long())

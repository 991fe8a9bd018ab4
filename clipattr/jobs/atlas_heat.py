"""Where in its top images each latent is: one more pass, over the images that are shown alone."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from clipattr.clip import Clip, image_tower
from clipattr.config.schema import Atlas
from clipattr.data import image_loader
from clipattr.data.pixels import Pixels
from clipattr.jobs.patch_maps import map_codes, map_reads, why_no_maps
from clipattr.jobs.shards import Images, count_workers
from clipattr.spliced import Spliced

logger = logging.getLogger(__name__)

# What a class token reads is large: all tokens of all blocks of every image.
_BATCH = 16
_PAIRS = 256
# Half of those of an explanation: a picture of 256 levels.
_POINTS = 8


class _Batch(NamedTuple):
    pixels: Float[Tensor, "batch 3 height width"]
    images: Int[Tensor, " pair"]
    """row of the pixels of each pair"""
    pairs: Int[Tensor, " pair"]
    """place of each pair among all examples"""


def read_heat(
    config: Atlas,
    clip: Clip,
    spliced: Spliced,
    images: Images,
    examples: Int[Tensor, "latent n"],
) -> UInt8[Tensor, "latent n row column"] | None:
    """What of each example the latent saw: 255 is the patch that has most of it.

    At a site with patches the activation at each; of a class token the patches that made the latent
    fire. What is negative counts as 0. None where the tower has no such map, which is logged.
    """
    obstacle = why_no_maps(spliced.cut)
    if obstacle is not None:
        logger.warning("no heatmaps: %s", obstacle)
        return None
    grid = image_tower(clip.model).patch_grid()
    heat = torch.zeros(examples.numel(), *grid, dtype=torch.uint8)
    for batch in _batches(config, clip, images, examples):
        latents = (batch.pairs // examples.shape[1]).to(clip.device)
        maps = _map(spliced, batch, latents).relu().cpu()
        largest = maps.amax(dim=1, keepdim=True)
        levels = torch.where(largest > 0, 255 * maps / largest, 0.0).round().to(torch.uint8)
        heat[batch.pairs] = levels.unflatten(1, grid)
    return heat.view(*examples.shape, *grid)


def _batches(
    config: Atlas, clip: Clip, images: Images, examples: Int[Tensor, "latent n"]
) -> Iterator[_Batch]:
    """Every image once, in as many batches as its examples need."""
    flat = examples.flatten()
    order = flat.argsort(stable=True)
    rows = flat[flat >= 0].unique()
    pixels = Pixels(clip.preprocess, config.data.decode.name)
    loader = image_loader(
        images.usable.select(rows.numpy()),
        pixels,
        batch_size=_BATCH,
        workers=count_workers(config.data),
    )
    hidden = not config.trainer.progress
    for batch in tqdm(loader, desc="heatmaps", unit="batch", disable=hidden, delay=2):
        if not len(batch.rows):
            continue
        read = pixels.normalise(batch.images.to(clip.device))
        wanted = rows[batch.rows]
        first, end = (torch.searchsorted(flat[order], wanted, right=side) for side in (False, True))
        counts = end - first
        here = torch.arange(len(wanted)).repeat_interleave(counts)
        within = torch.arange(len(here)) - (counts.cumsum(0) - counts)[here]
        pairs = order[first[here] + within]
        for some, those in zip(here.split(_PAIRS), pairs.split(_PAIRS), strict=True):
            yield _Batch(read, some.to(clip.device), those)


@torch.no_grad()
def _map(
    spliced: Spliced, batch: _Batch, latents: Int[Tensor, " pair"]
) -> Float[Tensor, "pair patch"]:
    cut = spliced.cut
    if cut.site.tokens == "cls":
        found = map_reads(spliced, batch.pixels, batch.images, latents, n_points=_POINTS)
        return found.patches
    codes = spliced.sae.encode(cut.read(batch.pixels).float())
    n_prefix = cut.trunk.n_prefix if cut.site.tokens == "all" else 0
    return map_codes(codes, batch.images, latents, n_prefix)

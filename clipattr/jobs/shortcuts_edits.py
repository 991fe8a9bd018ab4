"""Pictures of a set with a cue pasted, or cut out: to measure on, and to learn repairs from."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import CueConfig
from clipattr.data import ShardIndex
from clipattr.data.images import ImageError, image_loader
from clipattr.data.pixels import Pixels
from clipattr.data.shards import Sample
from clipattr.errors import DataError
from clipattr.jobs.shards import count_workers
from clipattr.jobs.site_states import spread
from clipattr.shortcuts.overlay import Kind, Overlay
from clipattr.shortcuts.pairs import Pairs, paste_pairs, region_pairs

# Grey levels of a mask above which a pixel belongs to the region.
_BRIGHT = 127


class Decoded(NamedTuple):
    """Some samples of a set, as the model sees them."""

    rows: Int[Tensor, " picture"]
    keys: list[str]
    images: UInt8[Tensor, "picture 3 height width"]


class Edits(NamedTuple):
    """Some samples of a set without a cue, with it and with a placebo, and what was left out."""

    rows: Int[Tensor, " picture"]
    pairs: Pairs
    warnings: list[str]


def decode_some(
    config: Shortcuts, reader: Pixels, samples: ShardIndex, among: Int[Tensor, " sample"]
) -> Decoded:
    """pairs.images of these samples, spread over them; what is broken was reported before."""
    chosen = among[torch.from_numpy(spread(len(among), min(config.pairs.images, len(among))))]
    loader = image_loader(
        samples.select(chosen.numpy()),
        reader,
        batch_size=config.data.batch_size,
        workers=count_workers(config.data),
    )
    batches = [batch for batch in loader if len(batch.rows)]
    rows = torch.cat([chosen[batch.rows] for batch in batches])
    keys = [key for batch in batches for key in batch.keys]
    return Decoded(rows, keys, torch.cat([batch.images for batch in batches]))


def paste(config: Shortcuts, decoded: Decoded, cue: CueConfig) -> Edits:
    """Each picture with the overlay of the cue."""
    assert cue.overlay is not None, "chosen for it"
    overlay = Overlay(Kind(cue.overlay.value), size=cue.size, text=cue.text)
    pairs = paste_pairs(decoded.images, decoded.keys, overlay, seed=config.seed)
    return Edits(decoded.rows, pairs, [])


def cut_out(
    config: Shortcuts,
    reader: Pixels,
    samples: ShardIndex,
    among: Int[Tensor, " sample"],
    cue: CueConfig,
    where: str,
) -> Edits:
    """Pictures whose region can be filled and has a placebo; the others are counted."""
    assert cue.region is not None, "chosen for it"
    has_region = among[torch.from_numpy(samples.has(cue.region))[among]]
    if not len(has_region):
        raise DataError(
            f"cue {cue.name!r}: no sample of {where} has the field {cue.region!r}; there are "
            f"{', '.join(samples.fields)}"
        )
    rows, keys, images = decode_some(config, reader, samples, has_region)
    kept, found = list[int](), list[Pairs]()
    for row, key, image in zip(rows.tolist(), keys, images, strict=True):
        region = _read_region(reader, samples[row], cue.region)
        if not region.any():
            continue
        try:
            found.append(region_pairs(image[None], [key], region[None], seed=config.seed))
        except DataError:  # nothing around it, or no room for a placebo: counted below
            continue
        kept.append(row)
    missing = len(keys) - len(kept)
    warning = f"{missing} of {len(keys)} images have no region, or one too large for a placebo"
    if not found:
        raise DataError(f"cue {cue.name!r}: {where}: {warning}")
    pairs = Pairs(
        [key for each in found for key in each.keys],
        without=torch.cat([each.without for each in found]),
        with_cue=torch.cat([each.with_cue for each in found]),
        placebo=torch.cat([each.placebo for each in found]),
    )
    return Edits(torch.tensor(kept), pairs, [warning] if missing else [])


def _read_region(reader: Pixels, sample: Sample, name: str) -> Bool[Tensor, "height width"]:
    try:
        mask = reader.read(sample.read(name))
    except ImageError as error:
        raise DataError(f"{sample.shard}: {sample.key}.{name} is no picture: {error}") from error
    return mask.float().mean(dim=0) > _BRIGHT

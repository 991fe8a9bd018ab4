"""Counterfactual pairs of every cue: pasted, cut out, or rendered twice; encoded once."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.callbacks.base import Batch
from clipattr.clip.cut import Rest
from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import CueConfig
from clipattr.data import ShardIndex
from clipattr.data.images import ImageError, image_loader
from clipattr.data.pixels import Pixels
from clipattr.data.shards import Sample, read_json
from clipattr.errors import DataError
from clipattr.jobs.shards import count_workers, find_images
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet, read_states
from clipattr.jobs.site_states import spread
from clipattr.shortcuts.overlay import Kind, Overlay
from clipattr.shortcuts.pairs import Pairs, paste_pairs, region_pairs

WITHOUT, WITH, PLACEBO = "without", "with", "placebo"
# Grey levels of a mask above which a pixel belongs to the region.
_BRIGHT = 127

Pictures = UInt8[Tensor, "picture 3 height width"]


class CuePairs(NamedTuple):
    """The same scenes without and with a cue, and with a placebo where there is one."""

    keys: list[str]
    states: dict[str, list[Batch]]
    """by variant; rows are the positions of the scenes"""
    embeddings: dict[str, Float[Tensor, "pair embed"]]
    """by variant; unit rows"""
    pictures: dict[str, Pictures]
    """by variant: the first few, as the model sees them"""
    warnings: list[str]
    is_cut_out: bool = False
    """the side without is the edited one, and so is the placebo: another region is cut out"""


def make_pairs(config: Shortcuts, audited: Audited, images: ImageSet) -> dict[str, CuePairs]:
    """The pairs of each cue that has any."""
    reader = Pixels(audited.clip.preprocess, config.data.decode.name)
    found: dict[str, CuePairs] = {}
    if any(cue.pair is not None for cue in config.cues):
        found |= _from_shards(config, audited, reader)
    pasted = [cue for cue in config.cues if cue.overlay is not None]
    if pasted:
        found |= _paste(config, audited, reader, images.samples, pasted)
    for cue in config.cues:
        if cue.region is not None:
            found[cue.name] = _cut_out(config, audited, reader, images.samples, cue)
    return found


def _from_shards(config: Shortcuts, audited: Audited, reader: Pixels) -> dict[str, CuePairs]:
    """Scenes that lack a state are left out and counted."""
    settings = config.pairs
    assert settings.shards is not None, "checked by the config"
    samples = find_images(
        settings.shards,
        config.data,
        ("json",),
        setting="pairs.shards",
        progress=config.trainer.progress,
    ).usable
    rows = _group_scenes(config, samples)
    states, _ = read_states(config, audited, samples)
    batches = list(states)
    encoded = set(torch.cat([row for _, row, _ in batches]).tolist())
    found: dict[str, CuePairs] = {}
    for cue in config.cues:
        if cue.pair is None:
            continue
        scenes = [scene for scene in rows if rows[scene].keys() >= {settings.without, cue.pair}]
        chosen = {
            WITHOUT: [rows[scene][settings.without] for scene in scenes],
            WITH: [rows[scene][cue.pair] for scene in scenes],
        }
        kept = [n for n in range(len(scenes)) if {chosen[v][n] for v in chosen} <= encoded]
        _check_count(len(kept), cue, f"pairs.shards={settings.shards}")
        parts = {
            variant: _select(batches, [row[n] for n in kept], len(samples))
            for variant, row in chosen.items()
        }
        shown = kept[: config.shortcuts.shown]
        pictures = {
            variant: _read_pictures(reader, [samples[row[n]] for n in shown])
            for variant, row in chosen.items()
        }
        keys = [samples.key(chosen[WITHOUT][n]) for n in kept]
        missing = len(rows) - len(kept)
        warnings = [f"{missing} of {len(rows)} scenes lack a picture and are left out"]
        found[cue.name] = _embed(audited, keys, parts, pictures, warnings if missing else [])
    return found


def _group_scenes(config: Shortcuts, samples: ShardIndex) -> dict[str, dict[str, int]]:
    """Scene -> state -> row."""
    settings = config.pairs
    scene_key, state_key = (one.removeprefix("json:") for one in (settings.scene, settings.state))
    scenes: dict[str, dict[str, int]] = {}
    for row in range(len(samples)):
        sample = samples[row]
        facts = read_json(sample)
        lacking = [key for key in (scene_key, state_key) if key not in facts]
        if lacking:
            raise DataError(
                f"{sample.shard}: {sample.key}.json has no key {lacking[0]!r}, as pairs.scene and "
                f"pairs.state ask for; it has {', '.join(facts)}"
            )
        states, state = scenes.setdefault(str(facts[scene_key]), {}), str(facts[state_key])
        if state in states:
            raise DataError(
                f"{sample.shard}: {sample.key} shows the scene {facts[scene_key]!r} in the state "
                f"{state!r}, and so does {samples.key(states[state])}"
            )
        states[state] = row
    return scenes


def _check_count(n_pairs: int, cue: CueConfig, where: str) -> None:
    if n_pairs < 2:
        raise DataError(f"cue {cue.name!r}: {n_pairs} pairs in {where}; an interval needs 2")


def _select(batches: Iterable[Batch], rows: Sequence[int], n_rows: int) -> list[Batch]:
    """The rows of a variant, by their place."""
    place = torch.full((n_rows,), -1)
    place[torch.tensor(rows)] = torch.arange(len(rows))
    found: list[Batch] = []
    for x, row, rest in batches:
        chosen = (place[row.cpu()] >= 0).nonzero().flatten()
        if len(chosen):
            part = chosen.to(x.device)
            found.append((x[part], place[row.cpu()[chosen]], rest.rows(part)))
    return found


def _paste(
    config: Shortcuts,
    audited: Audited,
    reader: Pixels,
    samples: ShardIndex,
    cues: Sequence[CueConfig],
) -> dict[str, CuePairs]:
    """Images spread over the set; the side without is encoded once for all cues."""
    settings = config.pairs
    rows = spread(len(samples), min(settings.images, len(samples)))
    keys, images = _decode(config, reader, samples.select(rows))
    without = _encode(config, audited, reader, images)
    found: dict[str, CuePairs] = {}
    for cue in cues:
        assert cue.overlay is not None, "chosen for it"
        _check_count(len(keys), cue, f"data.shards={config.data.shards}")
        overlay = Overlay(Kind(cue.overlay.value), size=cue.size, text=cue.text)
        pairs = paste_pairs(images, keys, overlay, seed=config.seed)
        states = {
            WITHOUT: without,
            WITH: _encode(config, audited, reader, pairs.with_cue),
            PLACEBO: _encode(config, audited, reader, pairs.placebo),
        }
        pictures = _first_pictures(pairs, config.shortcuts.shown)
        found[cue.name] = _embed(audited, keys, states, pictures, [])
    return found


def _cut_out(
    config: Shortcuts, audited: Audited, reader: Pixels, samples: ShardIndex, cue: CueConfig
) -> CuePairs:
    """Images whose region can be filled and has a placebo; the others are counted."""
    assert cue.region is not None, "chosen for it"
    has_region = np.flatnonzero(samples.has(cue.region))
    if not len(has_region):
        raise DataError(
            f"cue {cue.name!r}: no sample of data.shards={config.data.shards} has the field "
            f"{cue.region!r}; there are {', '.join(samples.fields)}"
        )
    chosen = has_region[spread(len(has_region), min(config.pairs.images, len(has_region)))]
    keys, images = _decode(config, reader, samples.select(chosen))
    row_of = {samples.key(row): row for row in chosen.tolist()}
    kept: list[Pairs] = []
    for key, image in zip(keys, images, strict=True):
        region = _read_region(reader, samples[row_of[key]], cue.region)
        if not region.any():
            continue
        try:
            kept.append(region_pairs(image[None], [key], region[None], seed=config.seed))
        except DataError:  # nothing around it, or no room for a placebo: counted below
            continue
    _check_count(len(kept), cue, f"the fields {cue.region} of data.shards={config.data.shards}")
    pairs = Pairs(
        [key for each in kept for key in each.keys],
        without=torch.cat([each.without for each in kept]),
        with_cue=torch.cat([each.with_cue for each in kept]),
        placebo=torch.cat([each.placebo for each in kept]),
    )
    sides = {WITHOUT: pairs.without, WITH: pairs.with_cue, PLACEBO: pairs.placebo}
    states = {side: _encode(config, audited, reader, each) for side, each in sides.items()}
    missing = len(keys) - len(kept)
    warning = f"{missing} of {len(keys)} images have no region, or one too large for a placebo"
    pictures = _first_pictures(pairs, config.shortcuts.shown)
    found = _embed(audited, pairs.keys, states, pictures, [warning] if missing else [])
    return found._replace(is_cut_out=True)


def _read_region(reader: Pixels, sample: Sample, name: str) -> Bool[Tensor, "height width"]:
    try:
        mask = reader.read(sample.read(name))
    except ImageError as error:
        raise DataError(f"{sample.shard}: {sample.key}.{name} is no picture: {error}") from error
    return mask.float().mean(dim=0) > _BRIGHT


def _decode(
    config: Shortcuts, reader: Pixels, samples: ShardIndex
) -> tuple[list[str], UInt8[Tensor, "image 3 height width"]]:
    """Images that can be decoded; what cannot was reported with the evaluated images."""
    loader = image_loader(
        samples, reader, batch_size=config.data.batch_size, workers=count_workers(config.data)
    )
    batches = list(loader)
    keys = [key for batch in batches for key in batch.keys]
    return keys, torch.cat([batch.images for batch in batches if len(batch.rows)])


def _read_pictures(reader: Pixels, samples: Sequence[Sample]) -> Pictures:
    """As the model sees them; they were encoded before, so that they can be read."""
    found: list[Tensor] = []
    for sample in samples:
        assert sample.image_field is not None, "every usable sample has an image"
        found.append(reader.read(sample.read(sample.image_field)))
    return torch.stack(found) if found else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)


def _first_pictures(pairs: Pairs, shown: int) -> dict[str, Pictures]:
    sides = {WITHOUT: pairs.without, WITH: pairs.with_cue, PLACEBO: pairs.placebo}
    return {side: images[:shown] for side, images in sides.items()}


@torch.no_grad()
def _encode(config: Shortcuts, audited: Audited, reader: Pixels, images: Tensor) -> list[Batch]:
    """States at the site, or embeddings where there is no SAE."""
    clip, size = audited.clip, config.data.batch_size
    found: list[Batch] = []
    for start in range(0, len(images), size):
        pixels = reader.normalise(images[start : start + size].to(clip.device))
        rows = torch.arange(start, start + len(pixels))
        if audited.spliced is None:
            found.append((clip.encode_image(pixels).float(), rows, Rest()))
            continue
        state = audited.spliced.cut.prefix(pixels)
        found.append((state.x.float(), rows, state.rest))
    return found


def _embed(
    audited: Audited,
    keys: list[str],
    states: dict[str, list[Batch]],
    pictures: dict[str, Pictures],
    warnings: list[str],
) -> CuePairs:
    embeddings = {
        variant: embed_states(audited, batches, len(keys)) for variant, batches in states.items()
    }
    return CuePairs(keys, states, embeddings, pictures, warnings)


@torch.no_grad()
def embed_states(
    audited: Audited, batches: Iterable[Batch], n_rows: int
) -> Float[Tensor, "row embed"]:
    """Unit embeddings on the CPU; 0 for a row that is in no batch."""
    device = audited.clip.device
    found = torch.zeros(n_rows, audited.clip.d_embed)
    for x, rows, rest in batches:
        embedding = x
        if audited.spliced is not None:
            embedding = audited.spliced.cut.suffix(x.to(device), rest)
        found[rows.cpu()] = normalize(embedding.float(), dim=-1).cpu()
    return found

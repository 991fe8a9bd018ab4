"""What repairs are learned from: images that are not evaluated, and those with the cue made."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.callbacks.base import Batch
from clipattr.config.schema import Shortcuts
from clipattr.data.pixels import Pixels
from clipattr.errors import DataError
from clipattr.jobs.apart import check_apart
from clipattr.jobs.shards import find_images
from clipattr.jobs.shortcuts_cue_images import CueImages
from clipattr.jobs.shortcuts_cues import KnownCue, infer_flags, read_flags
from clipattr.jobs.shortcuts_edits import Edits, cut_out, decode_some, paste
from clipattr.jobs.shortcuts_encoding import embed_states, encode
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet, read_images
from clipattr.shortcuts.cues import Cue


class Learned(NamedTuple):
    """The images that repairs are learned from."""

    images: ImageSet
    rows: Int[Tensor, " image"]
    """samples that could be read"""
    embeddings: Float[Tensor, "image embed"]


def read_learned(config: Shortcuts, audited: Audited, images: ImageSet) -> Learned | None:
    """Images of repair.shards, of which none may be evaluated, nor be shown in a pair."""
    if config.repair.shards is None:
        return None
    found = read_images(config, audited, config.repair.shards, "repair.shards")
    check_apart(
        images.samples,
        found.samples,
        f"repair.shards={config.repair.shards} and data.shards={config.data.shards}",
        "repairs are learned from images that are not evaluated",
    )
    _check_pairs(config, found)
    rows = torch.cat([row.cpu() for _, row, _ in found.batches]).sort().values
    embeddings = embed_states(audited, found.batches, len(found.samples))[rows]
    return Learned(found, rows, embeddings)


def _check_pairs(config: Shortcuts, found: ImageSet) -> None:
    """What a repair leaves of an effect is measured on them."""
    if config.pairs.shards is None or not any(cue.pair for cue in config.cues):
        return
    shown = find_images(
        config.pairs.shards,
        config.data,
        ("json",),
        setting="pairs.shards",
        progress=config.trainer.progress,
    )
    check_apart(
        shown.usable,
        found.samples,
        f"repair.shards={config.repair.shards} and pairs.shards={config.pairs.shards}",
        "repairs are learned from images on which they are not measured",
    )


def images_to_learn(
    config: Shortcuts, audited: Audited, learned: Learned, cue: KnownCue
) -> CueImages:
    """All images, with what is known of the cue; where pairs are made, some of them once more.

    As on the evaluated images: a column says it, or the picture was made so, or the latents.
    """
    settings, images = cue.settings, learned.images
    if cue.source == "pairs" and settings.pair is None:
        try:
            return _add_edited(config, audited, learned, cue)
        except DataError as error:  # regions may be drawn in the evaluated images alone
            cue.warnings.append(f"repair.shards={config.repair.shards}: {error}")
            return _unedited(learned, _unknown(images))
    if cue.source == "pairs":
        told = "what its latents do" if len(cue.latents) else "nothing"
        cue.warnings.append(
            "pairs.shards are measured, so that no repair is learned from them; "
            f"{told} says which images of repair.shards have it"
        )
    flags = read_flags(settings, images) or _infer(audited, learned, cue)
    return _unedited(learned, flags)


def _infer(audited: Audited, learned: Learned, cue: KnownCue) -> Cue:
    if not len(cue.latents):
        return _unknown(learned.images)
    try:
        has_cue = infer_flags(audited, learned.images, cue.latents, cue.threshold).has_cue
    except DataError as error:  # latents may fire in none of these images
        cue.warnings.append(f"which images of repair.shards have it is not known: {error}")
        return _unknown(learned.images)
    return Cue(has_cue, torch.ones_like(has_cue))


def _unknown(images: ImageSet) -> Cue:
    nothing = torch.zeros(len(images.samples), dtype=torch.bool)
    return Cue(nothing, nothing)


def _unedited(learned: Learned, flags: Cue) -> CueImages:
    images, rows = learned.images, learned.rows
    chosen = Cue(flags.has[rows], flags.known[rows])
    return CueImages(images.batches, learned.embeddings, images.labels[rows], chosen, rows)


def _add_edited(config: Shortcuts, audited: Audited, learned: Learned, cue: KnownCue) -> CueImages:
    """The edited side alone goes through CLIP, once; the other one was read before.

    Where a cue is pasted, every image as it is counts as one without it. Where it is cut out, that
    is known only of the images which it was cut out of.
    """
    reader = Pixels(audited.clip.preprocess, config.data.decode.name)
    edits = _edit(config, reader, learned, cue)
    is_pasted = cue.settings.overlay is not None
    edited = edits.pairs.with_cue if is_pasted else edits.pairs.without
    batches = encode(config, audited, reader, edited)
    n_images = len(learned.images.samples)
    embeddings = embed_states(audited, batches, len(edits.rows))
    is_source = torch.isin(learned.rows, edits.rows)
    has = torch.zeros_like(is_source) if is_pasted else is_source
    known = torch.ones_like(is_source) if is_pasted else is_source
    of_edited = torch.full((len(edits.rows),), is_pasted)
    flags = Cue(torch.cat([has, of_edited]), torch.cat([known, torch.ones_like(of_edited)]))
    sources = torch.cat([learned.rows, edits.rows])
    return CueImages(
        _Joined(learned.images.batches, [(x, n_images + row, rest) for x, row, rest in batches]),
        torch.cat([learned.embeddings, embeddings]),
        learned.images.labels[sources],
        flags,
        sources,
    )


def _edit(config: Shortcuts, reader: Pixels, learned: Learned, cue: KnownCue) -> Edits:
    samples = learned.images.samples
    if cue.settings.overlay is not None:
        return paste(config, decode_some(config, reader, samples, learned.rows), cue.settings)
    where = f"repair.shards={config.repair.shards}"
    return cut_out(config, reader, samples, learned.rows, cue.settings, where)


class _Joined:
    """Batches of two sets, one after the other, as often as they are asked for."""

    def __init__(self, *parts: Iterable[Batch]) -> None:
        self._parts = parts

    def __iter__(self):
        for part in self._parts:
            yield from part

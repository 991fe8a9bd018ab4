"""Counterfactual pairs of every cue: made of evaluated images; each picture is encoded once."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from clipattr.callbacks.base import Batch
from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import CueConfig
from clipattr.data.pixels import Pixels
from clipattr.errors import DataError
from clipattr.jobs.shortcuts_edits import Edits, cut_out, decode_some, paste
from clipattr.jobs.shortcuts_encoding import embed_states, encode
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet
from clipattr.jobs.site_states import spread

WITHOUT, WITH, PLACEBO = "without", "with", "placebo"
FEWEST_PAIRS = 10
"""fewer give no interval: a bootstrap of 5 calls nothing something 14 times in 100"""
GROUPS_SHOWN = 40
"""more groups have no pictures: a page of a thousand classes must stay one that opens"""

Pictures = dict[int, UInt8[Tensor, "3 height width"]]
"""by number of the pair, as the model sees them"""


class CuePairs(NamedTuple):
    """The same scenes without and with a cue, and with a placebo where there is one."""

    keys: list[str]
    states: dict[str, list[Batch]]
    """by variant; rows are the positions of the scenes"""
    embeddings: dict[str, Float[Tensor, "pair embed"]]
    """by variant; unit rows"""
    pictures: dict[str, Pictures]
    """by variant: the first few pairs, and examples of every label"""
    labels: Int[Tensor, " pair"] | None
    """None: nobody says"""
    warnings: list[str]
    is_cut_out: bool = False
    """the side without is the edited one, and so is the placebo: another region is cut out"""


def make_pairs(config: Shortcuts, audited: Audited, images: ImageSet) -> dict[str, CuePairs]:
    """Of each cue with an overlay or a region; the side without of overlays is encoded once."""
    reader = Pixels(audited.clip.preprocess, config.data.decode.name)
    where, among = f"data.shards={config.data.shards}", torch.arange(len(images.samples))
    pasted = [cue for cue in config.cues if cue.overlay is not None]
    found: dict[str, CuePairs] = {}
    if pasted:
        decoded = decode_some(config, reader, images.samples, among)
        without = encode(config, audited, reader, decoded.images)
        for cue in pasted:
            edits = paste(config, decoded, cue)
            states = {WITHOUT: without}
            found[cue.name] = _pair(config, audited, reader, images, cue, edits, states)
    for cue in config.cues:
        if cue.region is not None:
            edits = cut_out(config, reader, images.samples, among, cue, where)
            pairs = _pair(config, audited, reader, images, cue, edits, {})
            found[cue.name] = pairs._replace(is_cut_out=True)
    return found


def _pair(
    config: Shortcuts,
    audited: Audited,
    reader: Pixels,
    images: ImageSet,
    cue: CueConfig,
    edits: Edits,
    encoded: dict[str, list[Batch]],
) -> CuePairs:
    rows, (keys, *sides), left_out = edits
    check_count(len(keys), cue, f"data.shards={config.data.shards}")
    variants = dict(zip((WITHOUT, WITH, PLACEBO), sides, strict=True))
    states = {
        variant: encoded.get(variant) or encode(config, audited, reader, pixels)
        for variant, pixels in variants.items()
    }
    labels = images.labels[rows]
    shown = pick_pairs(config, audited, labels, len(keys))
    # Copies: a view would keep all the pixels.
    pictures = {
        variant: {number: pixels[number].clone() for number in shown}
        for variant, pixels in variants.items()
    }
    return embed_pairs(audited, keys, states, pictures, labels, left_out)


def check_count(n_pairs: int, cue: CueConfig, where: str) -> None:
    """Raise DataError where there are too few for an interval."""
    if n_pairs < 2:
        raise DataError(f"cue {cue.name!r}: {n_pairs} pairs in {where}; an interval needs 2")


def embed_pairs(
    audited: Audited,
    keys: list[str],
    states: dict[str, list[Batch]],
    pictures: dict[str, Pictures],
    labels: Int[Tensor, " pair"] | None,
    warnings: list[str],
) -> CuePairs:
    """With the embedding of every state."""
    embeddings = {
        variant: embed_states(audited, batches, len(keys)) for variant, batches in states.items()
    }
    return CuePairs(keys, states, embeddings, pictures, labels, warnings)


def pick_pairs(
    config: Shortcuts, audited: Audited, labels: Int[Tensor, " pair"] | None, n_pairs: int
) -> list[int]:
    """The first pairs, and of each label those that `pick_examples` takes."""
    shown = config.shortcuts.shown
    chosen = set(range(min(shown, n_pairs)))
    if labels is not None and 2 * len(audited.classes) <= GROUPS_SHOWN:
        for label in labels.unique():
            chosen |= set(pick_examples((labels == label).nonzero().flatten(), shown))
    return sorted(chosen)


def pick_examples(rows: Int[Tensor, " image"], shown: int) -> list[int]:
    """A few, spread over all."""
    return rows[torch.from_numpy(spread(len(rows), min(shown, len(rows))))].tolist()


def stack_sides(pairs: CuePairs) -> list[Batch]:
    """The pictures without, then those with, numbered on."""
    n_pairs = len(pairs.keys)
    moved = [(x, rows + n_pairs, rest) for x, rows, rest in pairs.states[WITH]]
    return [*pairs.states[WITHOUT], *moved]

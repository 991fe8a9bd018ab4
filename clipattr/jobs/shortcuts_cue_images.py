"""Labelled images of which something says whether they have a cue: groups are made of them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.callbacks.base import Batch
from clipattr.jobs.shortcuts_cues import KnownCue, flag_sides
from clipattr.jobs.shortcuts_effects import Passes
from clipattr.jobs.shortcuts_inputs import ImageSet
from clipattr.jobs.shortcuts_pairs import WITH, WITHOUT, CuePairs, stack_sides
from clipattr.shortcuts.cues import Cue


class CueImages(NamedTuple):
    """Images to measure on, or to learn from; all but the batches in the order of their rows."""

    batches: Iterable[Batch]
    embeddings: Float[Tensor, "image embed"]
    """unit rows"""
    labels: Int[Tensor, " image"]
    flags: Cue
    """whether they have the cue"""
    sources: Int[Tensor, " image"]
    """the sample, or the pair, that each is, or is made of"""


def evaluated_images(
    images: ImageSet, passes: Passes, cue: KnownCue, pairs: CuePairs | None
) -> CueImages:
    """Both sides of the pairs where these say who has the cue, else the evaluated images."""
    if cue.source == "pairs":
        assert pairs is not None, "they said it"
        assert pairs.labels is not None, "else they would not have"
        return CueImages(
            stack_sides(pairs),
            torch.cat([pairs.embeddings[WITHOUT], pairs.embeddings[WITH]]),
            pairs.labels.repeat(2),
            flag_sides(pairs),
            torch.arange(len(pairs.keys)).repeat(2),
        )
    rows, unknown = passes.result.rows, torch.zeros(len(images.samples), dtype=torch.bool)
    flags = cue.flags or Cue(unknown, unknown)
    chosen = Cue(flags.has[rows], flags.known[rows])
    return CueImages(images.batches, passes.result.embeddings, passes.labels, chosen, rows)

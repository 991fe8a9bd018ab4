"""With no cue named: latents that the probe uses more than the prompts do, confirmed exactly."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from clipattr.callbacks.shortcuts_result import CueEffect
from clipattr.config.schema import Shortcuts
from clipattr.jobs.shortcuts_cues import KnownCue
from clipattr.jobs.shortcuts_effects import Passes, removal_effect
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet
from clipattr.jobs.shortcuts_latents import read_activations_of
from clipattr.jobs.shortcuts_removal import Removed
from clipattr.shortcuts.automatic import Amplified, Ranking, rank_amplified

# Pairs of a ranking from which latents are taken: one may come first for many classes.
_PAIRS = 1000


class Confirmed(NamedTuple):
    """A pair of the ranking, and the exact effect of taking its latent out."""

    rank: int
    estimate: Amplified
    effect: CueEffect
    share_of_images: float
    cues: list[str]
    examples: list[int]
    """samples in which it fires most"""


class AmplifiedList(NamedTuple):
    """The ranking, and its first latents."""

    ranking: Ranking
    confirmed: list[Confirmed]


def name_of(latent: int) -> str:
    """Of a set of one latent."""
    return f"latent {latent}"


def rank(config: Shortcuts, passes: Passes) -> Ranking:
    """All latents and scores, by estimates."""
    assert passes.result.sums is not None, "there is an SAE"
    return rank_amplified(
        passes.result.sums, passes.spreads, level=config.shortcuts.level, n_first=_PAIRS
    )


def latents_to_confirm(config: Shortcuts, ranking: Ranking) -> list[int]:
    """The first of the ranking, each once."""
    latents = dict.fromkeys(each.latent for each in ranking.first)
    return list(latents)[: config.shortcuts.confirmed]


def confirm(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    ranking: Ranking,
    removed: Mapping[str, Removed],
    cues: Sequence[KnownCue],
) -> AmplifiedList:
    """Exact effects of the first latents on the score for which each came first."""
    sums = passes.result.sums
    assert sums is not None, "there is an SAE"
    examples = _examples(config, audited, images, latents_to_confirm(config, ranking))
    found: list[Confirmed] = []
    for latent, rows in examples.items():
        place, estimate = next(
            (number, each) for number, each in enumerate(ranking.first, 1) if each.latent == latent
        )
        name = name_of(latent)
        effect = removal_effect(config, audited, passes, removed[name], name, estimate.score)
        share = int(sums.fired[latent]) / sums.n_images
        among = [cue.name for cue in cues if latent in cue.latents.tolist()]
        found.append(Confirmed(place, estimate, effect, share, among, rows))
    return AmplifiedList(ranking, found)


def _examples(
    config: Shortcuts, audited: Audited, images: ImageSet, latents: list[int]
) -> dict[int, list[int]]:
    """Samples in which each latent fires most."""
    if not latents:
        return {}
    assert audited.spliced is not None, "there are latents"
    activations = read_activations_of(
        audited.spliced, images.batches, torch.tensor(latents), n_rows=len(images.samples)
    )
    top = activations.topk(min(config.shortcuts.shown, len(activations)), dim=0)
    return {
        latent: [
            row
            for row, value in zip(
                top.indices[:, n].tolist(), top.values[:, n].tolist(), strict=True
            )
            if value > 0
        ]
        for n, latent in enumerate(latents)
    }

"""Cues of a config on images: which have them, which latents stand for them, their directions."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.callbacks.base import Batch
from clipattr.clip import embed_prompts
from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import CueConfig
from clipattr.errors import DataError
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet
from clipattr.jobs.shortcuts_latents import (
    Flags,
    Separating,
    find_separating,
    read_activations_of,
)
from clipattr.jobs.shortcuts_pairs import WITH, WITHOUT, CuePairs
from clipattr.shortcuts.cues import Cue, group_images, parse_rule, read_cue
from clipattr.shortcuts.inferred import infer_cue


class KnownCue(NamedTuple):
    """A cue, and how it shows on the evaluated images."""

    settings: CueConfig
    flags: Flags | None
    """by image; None: nobody says"""
    is_inferred: bool
    """the flags are whether the latents fire, and not what somebody has written down"""
    latents: Int[Tensor, " latent"]
    direction: Float[Tensor, " embed"] | None
    """unit; from the prompt"""
    warnings: list[str]

    @property
    def name(self) -> str:
        """For tables."""
        return self.settings.name


def find_cues(
    config: Shortcuts, audited: Audited, images: ImageSet, pairs: Mapping[str, CuePairs]
) -> list[KnownCue]:
    """Every cue of the config."""
    written = {
        cue.name: flags for cue in config.cues if (flags := read_flags(cue, images)) is not None
    }
    found = _find_latents(config, audited, images, written, pairs)
    cues: list[KnownCue] = []
    for cue in config.cues:
        latents, warnings = found[cue.name]
        direction = None if cue.prompt is None else _direction(audited, cue.prompt)
        warnings = [*pairs[cue.name].warnings, *warnings] if cue.name in pairs else warnings
        known = KnownCue(cue, written.get(cue.name), False, latents, direction, warnings)
        if known.flags is None and len(latents):
            known = _infer(audited, images, known)
        if known.flags is not None:
            groups = group_images(images.labels, Cue(*known.flags), audited.classes, known.name)
            known.warnings.extend(groups.warnings())
        cues.append(known)
    return cues


def read_flags(cue: CueConfig, images: ImageSet) -> Flags | None:
    """What the field of a cue says of the images; None without a field."""
    if cue.field is None:
        return None
    return Flags(*read_cue(images.facts, parse_rule(cue.field), keys=images.keys))


def _find_latents(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    written: Mapping[str, Flags],
    pairs: Mapping[str, CuePairs],
) -> dict[str, tuple[Int[Tensor, " latent"], list[str]]]:
    """Those given; else those that tell flagged images; else those that tell the pairs apart."""
    none = torch.zeros(0, dtype=torch.int64)
    found = {
        cue.name: (torch.tensor(cue.latents, dtype=torch.int64), list[str]()) for cue in config.cues
    }
    spliced, at_least = audited.spliced, config.shortcuts.cue_auroc
    if spliced is None:
        return found
    asked = [cue for cue in config.cues if not cue.latents]
    flagged = {cue.name: written[cue.name] for cue in asked if _has_both(written.get(cue.name))}
    separating = (
        find_separating(spliced, images.batches, flagged, at_least=at_least) if flagged else {}
    )
    for cue in asked:
        if cue.name not in separating and cue.name in pairs:
            batches, flags = _stack(pairs[cue.name])
            separating |= find_separating(spliced, batches, {cue.name: flags}, at_least=at_least)
    for cue in asked:
        latents = separating.get(cue.name, Separating(none, torch.zeros(0))).latents
        found[cue.name] = latents, _explain(cue, len(latents), cue.name in separating, at_least)
    return found


def _explain(cue: CueConfig, n_latents: int, is_asked: bool, at_least: float) -> list[str]:
    if n_latents:
        return []
    if not is_asked:
        return [f"nothing says which images have {cue.name}, so that it has no latents"]
    return [
        f"no latent tells {cue.name} with an AUROC of {at_least}: what its removal does is not "
        "defined"
    ]


def _has_both(flags: Flags | None) -> bool:
    if flags is None:
        return False
    return bool((flags.known & flags.has).any() and (flags.known & ~flags.has).any())


def _stack(pairs: CuePairs) -> tuple[list[Batch], Flags]:
    """Without, then with: which is with is what latents shall tell."""
    n_pairs = len(pairs.keys)
    batches = list(pairs.states[WITHOUT])
    batches += [(x, rows + n_pairs, rest) for x, rows, rest in pairs.states[WITH]]
    is_with = torch.arange(2 * n_pairs) >= n_pairs
    return batches, Flags(is_with, torch.ones_like(is_with))


def _direction(audited: Audited, prompt: str) -> Float[Tensor, " embed"]:
    """What the prompt says beyond an empty one."""
    rows = embed_prompts(audited.clip, [prompt, ""]).cpu()
    return normalize(rows[0] - rows[1], dim=0)


def _infer(audited: Audited, images: ImageSet, cue: KnownCue) -> KnownCue:
    try:
        flags, words = infer_flags(audited, images, cue.latents)
    except DataError as error:  # latents may fire in none of these images, or alike in all
        return cue._replace(warnings=[*cue.warnings, f"no groups: {error}"])
    warning = f"which images have {cue.name} is inferred from its latents: {words}"
    return cue._replace(flags=flags, is_inferred=True, warnings=[*cue.warnings, warning])


def infer_flags(
    audited: Audited, images: ImageSet, latents: Int[Tensor, " latent"]
) -> tuple[Flags, str]:
    """Whether the latents of a cue fire in each image."""
    assert audited.spliced is not None, "a cue has latents of an SAE"
    activations = read_activations_of(
        audited.spliced, images.batches, latents, n_rows=len(images.samples)
    )
    found = infer_cue(activations.amax(dim=1))
    return Flags(found.has_cue, torch.ones_like(found.has_cue)), found.words

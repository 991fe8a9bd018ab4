"""Cues of a config on images: which have them, which latents stand for them, their directions."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import embed_prompts
from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import CueConfig
from clipattr.errors import DataError
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet
from clipattr.jobs.shortcuts_latents import (
    FEWEST,
    find_separating,
    read_activations_of,
    stratify,
)
from clipattr.jobs.shortcuts_pairs import CuePairs, stack_sides
from clipattr.shortcuts.cues import Cue, group_images, parse_rule, read_cue
from clipattr.shortcuts.inferred import InferredCue, infer_cue

Source = Literal["metadata", "pairs", "latents"]
"""what says which images have a cue, the first that does: a column, the pairs, or what fires"""


class KnownCue(NamedTuple):
    """A cue, and how it shows on the evaluated images."""

    settings: CueConfig
    flags: Cue | None
    """by evaluated image, of metadata or latents"""
    source: Source | None
    """what says which images have it, of which groups are made; None: nothing does"""
    latents: Int[Tensor, " latent"]
    direction: Float[Tensor, " embed"] | None
    """unit; from the prompt"""
    warnings: list[str]
    threshold: float | None = None
    """of the activation of its latents, where these say which images have it"""

    @property
    def name(self) -> str:
        """For tables."""
        return self.settings.name


def find_cues(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    learned: ImageSet | None,
    pairs: Mapping[str, CuePairs],
) -> list[KnownCue]:
    """Every cue of the config on the evaluated images.

    What has to be learned of a cue is learned from the images that repairs are learned from, where
    there are any: its latents from flags, and how far these must fire.
    """
    written = {
        cue.name: flags for cue in config.cues if (flags := read_flags(cue, images)) is not None
    }
    found = _find_latents(config, audited, images, learned, pairs)
    cues: list[KnownCue] = []
    for cue in config.cues:
        latents, warnings = found[cue.name]
        direction = None if cue.prompt is None else _direction(audited, cue.prompt)
        warnings = [*pairs[cue.name].warnings, *warnings] if cue.name in pairs else warnings
        known = KnownCue(cue, written.get(cue.name), None, latents, direction, warnings)
        cues.append(_add_source(audited, images, learned, known, pairs.get(cue.name)))
    return cues


def _add_source(
    audited: Audited,
    images: ImageSet,
    learned: ImageSet | None,
    cue: KnownCue,
    pairs: CuePairs | None,
) -> KnownCue:
    """What is written down comes first, then what was made; what fires is the last to ask."""
    labels = images.labels
    if cue.flags is not None:
        cue, flags = cue._replace(source="metadata"), cue.flags
    elif pairs is not None and pairs.labels is not None:
        cue, flags, labels = cue._replace(source="pairs"), flag_sides(pairs), pairs.labels.repeat(2)
    else:
        cue = _infer(audited, images, learned, cue) if len(cue.latents) else cue
        flags = cue.flags
    if flags is not None:
        groups = group_images(labels, flags, audited.classes, cue.name)
        cue.warnings.extend(groups.warnings())
    return cue


def read_flags(cue: CueConfig, images: ImageSet) -> Cue | None:
    """What the field of a cue says of the images; None without a field."""
    if cue.field is None:
        return None
    return read_cue(images.facts, parse_rule(cue.field), keys=images.keys)


def _find_latents(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    learned: ImageSet | None,
    pairs: Mapping[str, CuePairs],
) -> dict[str, tuple[Int[Tensor, " latent"], list[str]]]:
    """Those given; else those that tell flagged images; else those that tell the pairs apart.

    Flags count within labels. The sides of pairs have the same labels, and need none.
    """
    found = {
        cue.name: (torch.tensor(cue.latents, dtype=torch.int64), list[str]()) for cue in config.cues
    }
    spliced, at_least = audited.spliced, config.shortcuts.cue_auroc
    if spliced is None:
        return found
    asked = [cue for cue in config.cues if not cue.latents]
    where = images if learned is None else learned
    flagged = {
        cue.name: stratify(flags, where.labels)
        for cue in asked
        if (flags := read_flags(cue, where)) is not None
    }
    usable = {name: strata for name, strata in flagged.items() if len(strata.counts)}
    separating = (
        find_separating(spliced, where.batches, usable, at_least=at_least) if usable else {}
    )
    for cue in asked:
        if cue.name not in separating and cue.name in pairs:
            strata = stratify(flag_sides(pairs[cue.name]), None)
            if len(strata.counts):
                batches = stack_sides(pairs[cue.name])
                separating |= find_separating(
                    spliced, batches, {cue.name: strata}, at_least=at_least
                )
    for cue in asked:
        if cue.name not in separating:
            reason = _say_why_not(config, cue, pairs.get(cue.name), is_learned=learned is not None)
            found[cue.name][1].append(reason)
            continue
        latents = separating[cue.name].latents
        none = [] if len(latents) else [_say_none(cue, at_least)]
        found[cue.name] = latents, none
    return found


def _say_none(cue: CueConfig, at_least: float) -> str:
    within = "" if cue.field is None else " within labels"
    return (
        f"no latent tells {cue.name} with an AUROC of {at_least}{within}: what its removal does is "
        "not defined"
    )


def _say_why_not(
    config: Shortcuts, cue: CueConfig, pairs: CuePairs | None, *, is_learned: bool
) -> str:
    """Why latents of a cue were not looked for."""
    if pairs is not None:
        return f"{len(pairs.keys)} pairs of {cue.name} are too few to find its latents ({FEWEST})"
    if cue.field is None:
        return f"nothing says which images have {cue.name}, so that it has no latents"
    setting = "repair.shards" if is_learned else "data.shards"
    shards = config.repair.shards if is_learned else config.data.shards
    return (
        f"no label of {setting}={shards} has {FEWEST} images with {cue.name} and {FEWEST} without: "
        "what belongs to the cue cannot be told from what belongs to the label, and it has no "
        "latents unless they are named"
    )


def flag_sides(pairs: CuePairs) -> Cue:
    """Of `stack_sides`: known of every picture, because it was made so."""
    is_with = torch.arange(2 * len(pairs.keys)) >= len(pairs.keys)
    return Cue(is_with, torch.ones_like(is_with))


def _direction(audited: Audited, prompt: str) -> Float[Tensor, " embed"]:
    """What the prompt says beyond an empty one."""
    rows = embed_prompts(audited.clip, [prompt, ""]).cpu()
    return normalize(rows[0] - rows[1], dim=0)


def _infer(audited: Audited, images: ImageSet, learned: ImageSet | None, cue: KnownCue) -> KnownCue:
    where = images if learned is None else learned
    try:
        threshold = infer_flags(audited, where, cue.latents).threshold
    except DataError as error:  # latents may fire in none of these images, or alike in all
        learns = "" if learned is None else "repair.shards: "
        return cue._replace(warnings=[*cue.warnings, f"no groups: {learns}{error}"])
    found = infer_flags(audited, images, cue.latents, threshold)
    flags = Cue(found.has_cue, torch.ones_like(found.has_cue))
    warning = f"which images have {cue.name} is inferred from its latents: {found.words}"
    warnings = [*cue.warnings, warning]
    return cue._replace(flags=flags, source="latents", warnings=warnings, threshold=threshold)


def infer_flags(
    audited: Audited,
    images: ImageSet,
    latents: Int[Tensor, " latent"],
    threshold: float | None = None,
) -> InferredCue:
    """Whether the latents of a cue fire in each image, or exceed the threshold."""
    assert audited.spliced is not None, "a cue has latents of an SAE"
    activations = read_activations_of(
        audited.spliced, images.batches, latents, n_rows=len(images.samples)
    )
    return infer_cue(activations.amax(dim=1), threshold)

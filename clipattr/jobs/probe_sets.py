"""Labelled images that a probe is fitted or chosen on: labels, cue, and the rows of features."""

import logging
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.clip import Clip
from clipattr.codes import SparseCodes
from clipattr.config.probe import ProbeConfig
from clipattr.config.schema import TrainProbe
from clipattr.data import ShardIndex
from clipattr.data.shards import read_json, read_label
from clipattr.errors import ConfigError, DataError
from clipattr.jobs.apart import check_apart
from clipattr.jobs.class_head import needed_fields
from clipattr.jobs.class_names import check_class_names
from clipattr.jobs.probe_features import (
    FeatureReader,
    FeatureRows,
    Features,
    describe_codes,
    fill_cache,
)
from clipattr.jobs.shards import Images, find_images
from clipattr.probes.features import FeatureSpec
from clipattr.shortcuts.cues import Cue, group_images, parse_rule, read_cue
from clipattr.shortcuts.inferred import InferredCue, infer_cue

logger = logging.getLogger(__name__)

Targets = Int[Tensor, " image"] | Float[Tensor, "image class"]
"""Class numbers; of several labels 0 and 1."""


class ProbeSet(NamedTuple):
    """Images of shards with their labels, before anything of CLIP is computed."""

    images: Images
    targets: Targets
    """of every usable image"""
    cue: Cue | None
    """from metadata; None where there is none, or latents stand for it"""


class ProbeRows(NamedTuple):
    """Features and labels, row by row."""

    x: Features
    targets: Targets
    has_cue: Bool[Tensor, " image"] | None
    known: Bool[Tensor, " image"] | None
    found: FeatureRows
    threshold: float | None = None
    """of the latents that stand for the cue: images above it have it"""

    @property
    def groups(self) -> Int[Tensor, " image"] | None:
        """Label x cue; of images whose cue is unknown it says nothing."""
        return None if self.has_cue is None else self.targets * 2 + self.has_cue.long()

    def of_known_groups(self) -> "ProbeRows":
        """The rows whose cue is known."""
        if self.known is None or self.has_cue is None or bool(self.known.all()):
            return self
        rows = self.known.nonzero().squeeze(1)
        x = self.x.select(rows) if isinstance(self.x, SparseCodes) else self.x[rows]
        return ProbeRows(x, self.targets[rows], self.has_cue[rows], self.known[rows], self.found)


def read_set(config: TrainProbe, shards: str, setting: str) -> ProbeSet:
    """Labels, and the cue where a field says it."""
    probe = config.probe
    fields = [*probe.labels, *([] if probe.groups is None else [probe.groups])]
    needed = tuple(dict.fromkeys(name for one in fields for name in needed_fields(one)))
    images = find_images(
        shards, config.data, needed, setting=setting, progress=config.trainer.progress
    )
    if not probe.is_multilabel:
        check_class_names(images.usable, probe.labels[0], probe.classes, "probe.classes")
    cue = None
    if probe.groups is not None:
        content = [read_json(one) for one in images.usable]
        cue = read_cue(content, parse_rule(probe.groups), keys=[one.key for one in images.usable])
    return ProbeSet(images, _read_targets(images.usable, probe), cue)


def check_sets(config: TrainProbe, training: ProbeSet, validation: ProbeSet | None) -> None:
    """Raise for labels that nothing can be learned from, or chosen by; warn of missing classes."""
    _check_labels(training, config.data.shards, "data.shards: nothing to learn")
    if validation is None:
        return
    where = config.validation or ""
    _check_labels(validation, where, "validation: nothing to choose by")
    if not config.probe.is_multilabel:
        seen, judged = training.targets.unique(), validation.targets.unique()
        missing = [config.probe.classes[one] for one in seen.tolist() if one not in judged]
        if missing:
            logger.warning("validation=%s: has no image of %s", where, ", ".join(missing))
    check_apart(
        training.images.usable,
        validation.images.usable,
        f"data.shards={config.data.shards} and validation={where}",
        "a choice needs images that no fit has seen",
    )


def _check_labels(labelled: ProbeSet, where: str, rule: str) -> None:
    targets = labelled.targets
    if len(targets) < 2:
        raise DataError(f"{where}: holds {len(targets)} usable image(s), at least 2; {rule}")
    if not targets.is_floating_point() and len(targets.unique()) < 2:
        raise DataError(f"{where}: all rows have the label {int(targets[0])}; {rule}")


def open_cue(config: TrainProbe, clip: Clip) -> FeatureReader | None:
    """Reads the codes whose latents stand for the cue, where they do."""
    latents = config.probe.groups_latents
    if not latents:
        return None
    assert config.sae is not None, "checked by the config"
    part, sae = describe_codes(clip, config.sae, "max")
    if max(latents) >= sae.n_latents:
        raise ConfigError(
            f"probe.groups_latents={latents}: {config.sae} has {sae.n_latents} latents, "
            f"0 to {sae.n_latents - 1}"
        )
    return FeatureReader(FeatureSpec((part,)), clip, sae)


def read_rows(
    config: TrainProbe,
    reader: FeatureReader,
    cue_reader: FeatureReader | None,
    labelled: ProbeSet,
    name: str,
    threshold: float | None = None,
) -> ProbeRows:
    """The features of a set with what is known of their images.

    Args:
        config: of the job.
        reader: of the features.
        cue_reader: as `open_cue` gives it.
        labelled: the images.
        name: for the log.
        threshold: of the cue's latents in other images; None: it is found in these.
    """
    images, data, progress = labelled.images, config.data, config.trainer.progress
    if cue_reader is not None:
        fill_cache([reader, cue_reader], images, data, progress=progress)
    found = reader.of_shards(images, data, progress=progress)
    targets = labelled.targets[found.images]
    has_cue, known = None, None
    if labelled.cue is not None:
        has_cue, known = (each[found.images] for each in labelled.cue)
    elif cue_reader is not None:
        cue = _infer_cue(config, cue_reader, images, name, threshold)
        has_cue, known, threshold = cue.has_cue, torch.ones_like(cue.has_cue), cue.threshold
    if has_cue is not None and known is not None:
        _warn_of_groups(config.probe, targets, Cue(has_cue, known), name)
    return ProbeRows(found.x, targets, has_cue, known, found, threshold)


def _read_targets(index: ShardIndex, probe: ProbeConfig) -> Targets:
    if not probe.is_multilabel:
        label, names = probe.labels[0], probe.classes
        return torch.tensor([read_label(one, label, names) for one in index])
    rows = [[read_label(one, label, ("0", "1")) for label in probe.labels] for one in index]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, len(probe.labels))


def _infer_cue(
    config: TrainProbe, reader: FeatureReader, images: Images, name: str, threshold: float | None
) -> InferredCue:
    """Whether the latents that stand for the cue fire, or exceed a threshold."""
    latents = torch.tensor(config.probe.groups_latents)
    found = reader.of_shards(images, config.data, progress=config.trainer.progress)
    codes = found.x
    assert isinstance(codes, SparseCodes), "a part of codes"
    activation = codes.values.where(torch.isin(codes.indices, latents), 0).sum(dim=1)
    cue = infer_cue(activation, threshold)
    logger.info("%s: latents %s stand for the cue: %s", name, latents.tolist(), cue.words)
    return cue


def _warn_of_groups(probe: ProbeConfig, targets: Tensor, cue: Cue, name: str) -> None:
    words = probe.groups or f"latents {probe.groups_latents}"
    if not bool(cue.known.any()):
        raise DataError(f"{name}: of no image it is known whether it has the cue {words}")
    for warning in group_images(targets, cue, probe.classes, words).warnings():
        logger.warning("%s: %s", name, warning)

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
from clipattr.jobs.class_head import needed_fields
from clipattr.jobs.probe_features import FeatureReader, FeatureRows, Features, describe_codes
from clipattr.jobs.shards import Images, find_images
from clipattr.probes.features import FeatureSpec
from clipattr.shortcuts.cues import Cue, group_images, parse_rule, read_cue
from clipattr.shortcuts.inferred import infer_cue

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
    cue = None
    if probe.groups is not None:
        content = [read_json(one) for one in images.usable]
        cue = read_cue(content, parse_rule(probe.groups), keys=[one.key for one in images.usable])
    return ProbeSet(images, _read_targets(images.usable, probe), cue)


def read_rows(
    config: TrainProbe,
    reader: FeatureReader,
    labelled: ProbeSet,
    name: str,
) -> ProbeRows:
    """The features of a set with what is known of their images; `name` is for the log."""
    images, data, progress = labelled.images, config.data, config.trainer.progress
    found = reader.of_shards(images, data, progress=progress)
    targets = labelled.targets[found.images]
    has_cue, known = None, None
    if labelled.cue is not None:
        has_cue, known = (each[found.images] for each in labelled.cue)
    elif config.probe.groups_latents:
        has_cue = _infer_cue(config, reader.clip, images)
        known = torch.ones_like(has_cue)
    if has_cue is not None and known is not None:
        _warn_of_groups(config.probe, targets, Cue(has_cue, known), name)
    return ProbeRows(found.x, targets, has_cue, known, found)


def _read_targets(index: ShardIndex, probe: ProbeConfig) -> Targets:
    if not probe.is_multilabel:
        label, names = probe.labels[0], probe.classes
        return torch.tensor([read_label(one, label, names) for one in index])
    rows = [[read_label(one, label, ("0", "1")) for label in probe.labels] for one in index]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, len(probe.labels))


def _infer_cue(config: TrainProbe, clip: Clip, images: Images) -> Bool[Tensor, " image"]:
    """Whether the latents that stand for the cue fire."""
    assert config.sae is not None, "checked by the config"
    part, sae = describe_codes(clip, config.sae, "max")
    latents = torch.tensor(config.probe.groups_latents)
    if int(latents.max()) >= sae.n_latents:
        raise ConfigError(
            f"probe.groups_latents={latents.tolist()}: {config.sae} has {sae.n_latents} latents, "
            f"0 to {sae.n_latents - 1}"
        )
    reader = FeatureReader(FeatureSpec((part,)), clip, sae)
    found = reader.of_shards(images, config.data, progress=config.trainer.progress)
    codes = found.x
    assert isinstance(codes, SparseCodes), "a part of codes"
    activation = codes.values.where(torch.isin(codes.indices, latents), 0).sum(dim=1)
    cue = infer_cue(activation)
    logger.info("latents %s stand for the cue: %s", latents.tolist(), cue.words)
    return cue.has_cue


def _warn_of_groups(probe: ProbeConfig, targets: Tensor, cue: Cue, name: str) -> None:
    words = probe.groups or f"latents {probe.groups_latents}"
    if not bool(cue.known.any()):
        raise DataError(f"{name}: of no image it is known whether it has the cue {words}")
    for warning in group_images(targets, cue, probe.classes, words).warnings():
        logger.warning("%s: %s", name, warning)

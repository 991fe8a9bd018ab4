"""What the job on shortcuts reads: the model, both heads, an SAE, and images with their labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.callbacks.base import Batch
from clipattr.callbacks.shortcuts import LinearHead
from clipattr.clip import Clip, load_templates, text_head
from clipattr.clip.cut import Rest
from clipattr.config.schema import Shortcuts
from clipattr.data import BadSample, ShardIndex, load_features
from clipattr.data.shards import read_json, read_label
from clipattr.errors import ConfigError
from clipattr.jobs.class_head import needed_fields
from clipattr.jobs.class_names import check_class_names, check_prompts
from clipattr.jobs.evaluate_sae import splice_in
from clipattr.jobs.model import load_model, read_embeddings
from clipattr.jobs.shards import Images, find_images
from clipattr.jobs.site_states import CachedStates, FreshStates
from clipattr.probes.files import EMBEDDING, ProbeRecord, load_head
from clipattr.probes.linear import LinearProbe
from clipattr.shortcuts.contrast import score_names
from clipattr.spliced import Spliced

TEXT, PROBE = "text", "probe"
HEADS = (TEXT, PROBE)


class Audited(NamedTuple):
    """A probe, what it is compared with, and what it may be looked into with."""

    clip: Clip
    probe: LinearProbe
    """on the CPU"""
    record: ProbeRecord
    heads: dict[str, LinearHead]
    """text and probe, on the device"""
    prompts: tuple[str, ...]
    classes: tuple[str, ...]
    label: str
    spliced: Spliced | None
    reference: LinearProbe | None
    """a probe that never saw the cues"""

    @property
    def scores(self) -> tuple[str, ...]:
        """What is said of each score."""
        return score_names(self.classes)

    @property
    def model(self) -> dict[str, str]:
        """As files name it."""
        return self.record.model

    def scale(
        self, head: str, logits: Float[Tensor, "image class"]
    ) -> Float[Tensor, "image class"]:
        """Logits whose softmax are probabilities; a cosine is scaled as the model does it."""
        return self.clip.logit_scale * logits if head == TEXT else logits


class ImageSet(NamedTuple):
    """Labelled images and what enters the rest of the model for each."""

    samples: ShardIndex
    labels: Int[Tensor, " sample"]
    facts: Sequence[Mapping[str, object]]
    """JSON of each sample; empty where no cue asks for it"""
    batches: "CachedStates | list[Batch]"
    """rows are those of the samples; without an SAE x is the embedding"""
    bad: list[BadSample]

    @property
    def keys(self) -> list[str]:
        """Of the samples."""
        return [self.samples.key(row) for row in range(len(self.samples))]


def load_audited(config: Shortcuts) -> Audited:
    """Load and check everything that images are shown to."""
    clip = load_model(config.model, config.trainer.accelerator)
    model = {"name": config.model.name, "weights_sha256": clip.weights_sha256}
    probe, record = load_linear(config.probe, model, "probe")
    classes = tuple(record.class_names)
    prompts = tuple(config.prompts) or classes
    if len(prompts) != len(classes):
        raise ConfigError(
            f"prompts: {len(prompts)}, and the probe {config.probe} has {len(classes)} classes: "
            f"name one prompt for each of {list(classes)}, in this order"
        )
    check_prompts(prompts, classes, "prompts")
    templates = load_templates("none" if config.prompts else config.templates)
    cache, progress = Path(config.data.cache) / "text", config.trainer.progress
    rows = text_head(clip, prompts, templates=templates, cache=cache, progress=progress).weights
    probe = probe.requires_grad_(False)
    rows = rows.to(clip.device).float()
    heads = {
        TEXT: LinearHead(rows, rows.new_zeros(len(rows))),
        PROBE: LinearHead(probe.weight.to(clip.device), probe.bias.to(clip.device)),
    }
    shown = prompts if config.prompts else tuple(templates[0].replace("{}", one) for one in prompts)
    label = record.label_field if config.label is None else config.label
    spliced = None if config.sae is None else splice_in(config.sae, config.model.name, clip)
    _check_latents(config, spliced)
    reference = _load_reference(config, model, classes)
    return Audited(clip, probe, record, heads, shown, classes, label, spliced, reference)


def load_linear(
    folder: str, model: Mapping[str, str], setting: str
) -> tuple[LinearProbe, ProbeRecord]:
    """A linear probe of the unit embedding; ConfigError for any other head."""
    head, record = load_head(folder, expected_model=model)
    if record.is_multilabel:
        raise ConfigError(
            f"{setting}={folder}: its classes are each true or not by themselves; scores here are "
            "of one class rather than the others. Train one probe for each pair of classes"
        )
    if not isinstance(head, LinearProbe) or record.feature != EMBEDDING:
        raise ConfigError(
            f"{setting}={folder}: is a {type(head).__name__} of {record.feature}. This job "
            f"compares a linear probe of the {EMBEDDING} with prompts, which are linear in it as "
            "well; train one with the defaults of train_probe"
        )
    return head, record


def _load_reference(
    config: Shortcuts, model: Mapping[str, str], classes: tuple[str, ...]
) -> LinearProbe | None:
    folder = config.repair.reference
    if folder is None:
        return None
    probe, record = load_linear(folder, model, "repair.reference")
    if tuple(record.class_names) != classes:
        raise ConfigError(
            f"repair.reference={folder}: tells {record.class_names} apart, and "
            f"probe={config.probe} {list(classes)}; they must be the same"
        )
    return probe.requires_grad_(False)


def _check_latents(config: Shortcuts, spliced: Spliced | None) -> None:
    for cue in config.cues:
        if spliced is not None and max(cue.latents, default=0) >= spliced.sae.n_latents:
            raise ConfigError(
                f"cues: {cue.name} has latents={cue.latents}; those of {config.sae} are 0 to "
                f"{spliced.sae.n_latents - 1}"
            )


def read_images(config: Shortcuts, audited: Audited, shards: str, setting: str) -> ImageSet:
    """Labels, JSON and states of the images of some shards."""
    progress = config.trainer.progress
    needs_json = any(cue.field is not None for cue in config.cues)
    needed = {*needed_fields(audited.label), *(("json",) if needs_json else ())}
    images = find_images(
        shards, config.data, tuple(sorted(needed)), setting=setting, progress=progress
    )
    named = f"classes of probe={config.probe}"
    check_class_names(images.usable, audited.label, audited.classes, named)
    labels = [read_label(one, audited.label, audited.classes) for one in images.usable]
    facts = [read_json(one) for one in images.usable] if needs_json else []
    batches, undecodable = read_states(config, audited, images.usable)
    bad = images.add_bad(undecodable, config.data.max_bad_fraction)
    return ImageSet(images.usable, torch.tensor(labels), facts, batches, bad)


def read_states(
    config: Shortcuts, audited: Audited, samples: ShardIndex
) -> tuple["CachedStates | list[Batch]", list[BadSample]]:
    """States at the site, or embeddings where there is no SAE. No image enters CLIP twice.

    Behind the last block they are rows of the cache. Elsewhere they are kept in memory for every
    pass: 4 bytes x tokens x width of each image, twice where the suffix needs a rest.
    """
    images, progress = Images(samples, []), config.trainer.progress
    if audited.spliced is None:
        store = read_embeddings(audited.clip, samples, config.data, progress=progress)
        x, rows = load_features(store)
        size = config.data.batch_size
        found = [
            (part, row, Rest()) for part, row in zip(x.split(size), rows.split(size), strict=True)
        ]
        return found, store.bad
    cut = audited.spliced.cut
    if cut.has_last_layer:
        states = CachedStates(audited.clip, cut, images, config.data, n_mean=1, progress=progress)
        return states, states.bad
    states = FreshStates(audited.clip, cut, images, config.data, n_mean=1)
    return list(states), states.bad

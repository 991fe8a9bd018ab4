"""What the evaluation of attribution reads: a head, images at the site, the class of each."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.clip import Clip, Cut
from clipattr.config.choices import Explained
from clipattr.config.inputs import DataConfig
from clipattr.config.schema import EvaluateAttribution
from clipattr.data import BadSample, Ranks
from clipattr.data.index import ShardIndex
from clipattr.data.shards import read_label
from clipattr.jobs.class_head import load_classes, needed_fields
from clipattr.jobs.shards import Images
from clipattr.jobs.site_states import Batch, CachedStates, FreshStates, spread
from clipattr.probes import load_probe
from clipattr.spliced import Spliced


class Head(NamedTuple):
    """Rows of classes, and the field of a sample that names its class."""

    names: tuple[str, ...]
    weights: Float[Tensor, "class embed"]
    bias: Float[Tensor, " class"] | None
    label: str | None


class Rows(NamedTuple):
    """Images at the site: those of the table, and all of the reliance matrix."""

    chosen: list[Batch]
    """rows are counted within the chosen images"""
    all: Iterable[Batch] | None
    """None where the suffix would have to run for every class"""
    targets: Int[Tensor, " image"]
    """the class that each chosen image is explained for"""
    bad: list[BadSample]


def needed(config: EvaluateAttribution) -> tuple[str, ...]:
    """Fields that a sample must have; of a probe its file says which one is the label."""
    if config.evaluation.explained is not Explained.label:
        return ()
    if config.probe is not None:
        return needed_fields(load_probe(config.probe)[1].label_field)
    assert config.zeroshot is not None, "checked by the config"
    assert config.zeroshot.label is not None, "checked by the config"
    return needed_fields(config.zeroshot.label)


def load_head(config: EvaluateAttribution, clip: Clip) -> Head:
    """Prompts of the classes, or the probe."""
    if config.zeroshot is not None:
        classes = load_classes(config.zeroshot)
        head = classes.head(clip, config.data.cache, progress=config.trainer.progress)
        return Head(head.names, head.weights.to(clip.device), None, config.zeroshot.label)
    assert config.probe is not None, "checked by the config"
    model = {"name": config.model.name, "weights_sha256": clip.weights_sha256}
    probe, record = load_probe(config.probe, expected_model=model)
    probe = probe.requires_grad_(False).to(clip.device)
    return Head(tuple(record.class_names), probe.weight, probe.bias, record.label_field)


def read_rows(
    config: EvaluateAttribution, clip: Clip, spliced: Spliced, images: Images, head: Head
) -> Rows:
    """Cached rows behind the last block; elsewhere the chosen images alone go through the prefix.

    The states of the chosen images are kept for every pass: 4 bytes x tokens x width of each, twice
    where the suffix needs a rest.
    """
    found = read_chosen(
        clip,
        spliced.cut,
        images,
        config.data,
        n_chosen=config.evaluation.images,
        progress=config.trainer.progress,
    )
    if config.evaluation.explained is Explained.label:
        targets = _read_labels(found.samples, head)
    else:
        targets = predict(spliced.cut, found.batches, head, len(found.samples))
    return Rows(found.batches, found.all, targets, found.bad)


class Chosen(NamedTuple):
    """Some images of a set, spread over it, at a site."""

    batches: list[Batch]
    """rows are counted within the chosen images"""
    samples: ShardIndex
    """the chosen images"""
    all: CachedStates | None
    """every image of the set, where all are cached"""
    bad: list[BadSample]


def read_chosen(
    clip: Clip,
    cut: Cut,
    images: Images,
    data: DataConfig,
    *,
    n_chosen: int,
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool,
) -> Chosen:
    """Cached rows behind the last block; elsewhere the chosen images alone go through the prefix.

    `ranks` write the cache together, and each has all of the chosen images.
    """
    n_images = len(images.usable)
    order = spread(n_images, min(n_chosen, n_images))
    index = images.usable.select(order)
    if cut.has_last_layer:
        cached = CachedStates(clip, cut, images, data, n_mean=1, ranks=ranks, progress=progress)
        batches = _renumber(cached, torch.from_numpy(order), n_images)
        return Chosen(batches, index, cached, cached.bad)
    fresh = FreshStates(clip, cut, Images(index, images.bad), data, n_mean=1)
    batches = list(fresh)
    return Chosen(batches, index, None, fresh.bad)


def _renumber(states: CachedStates, order: Tensor, n_images: int) -> list[Batch]:
    """The chosen rows of each batch, by their place among the chosen."""
    place = torch.full((n_images,), -1)
    place[order] = torch.arange(len(order))
    found: list[Batch] = []
    for x, rows, rest in states:
        is_chosen = place[rows] >= 0
        if is_chosen.any():
            found.append((x[is_chosen], place[rows[is_chosen]], rest))
    return found


def _read_labels(index: ShardIndex, head: Head) -> Int[Tensor, " image"]:
    assert head.label is not None, "checked by the config"
    label = head.label
    return torch.tensor([read_label(one, label, head.names) for one in index])


@torch.no_grad()
def predict(cut: Cut, batches: list[Batch], head: Head, n_images: int) -> Int[Tensor, " image"]:
    """The class with the highest score of each image, by its row; 0 of one that is in no batch."""
    targets = torch.zeros(n_images, dtype=torch.int64)
    for x, rows, rest in batches:
        embedding = cut.suffix(x.to(head.weights.device), rest).to(head.weights.dtype)
        scores = torch.nn.functional.normalize(embedding, dim=-1) @ head.weights.T
        scores = scores if head.bias is None else scores + head.bias
        targets[rows.cpu()] = scores.argmax(dim=1).cpu()
    return targets

"""What the atlas reads: a head, images at the site, and what a semantic scorer sees in them."""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import Clip, embed_prompts, text_head
from clipattr.clip.templates import SLOT
from clipattr.config.schema import Atlas
from clipattr.data import load_features
from clipattr.errors import ConfigError
from clipattr.jobs.attribution_inputs import Head
from clipattr.jobs.class_head import Classes
from clipattr.jobs.model import load_model, read_embeddings
from clipattr.jobs.shards import Images
from clipattr.jobs.site_states import CachedStates, FreshStates
from clipattr.probes import load_probe
from clipattr.semantics.vocabulary import load_vocabulary
from clipattr.spliced import Spliced

WRITTEN = f'the word "{SLOT}" written on it'
"""the prompt of a class's name that is read, not seen"""


class Texts(NamedTuple):
    """What the scorer compares images with; unit rows."""

    names: tuple[str, ...]
    """of the classes, as they are shown"""
    words: tuple[str, ...]
    """vocabulary and classes, each once"""
    of_words: Float[Tensor, "word embed"]
    of_classes: Float[Tensor, "class embed"]
    of_written: Float[Tensor, "class embed"]
    """names of classes in writing"""
    empty: Float[Tensor, " embed"]
    class_words: tuple[str, ...]
    """the word of each class in its prompt"""


class Scored(NamedTuple):
    """The scorer, its texts and its embeddings of the images."""

    clip: Clip
    texts: Texts
    embeddings: Float[Tensor, "image embed"]
    """rows of the index; nan: an image that could not be decoded"""


def load_head(config: Atlas, clip: Clip, classes: Classes) -> Head:
    """The prompts of the classes, or a probe of the same classes."""
    if config.probe is None:
        head = classes.head(clip, config.data.cache, progress=config.trainer.progress)
        return Head(head.names, head.weights.to(clip.device), None, config.zeroshot.label)
    model = {"name": config.model.name, "weights_sha256": clip.weights_sha256}
    probe, record = load_probe(config.probe, expected_model=model)
    names = classes.names.names
    if tuple(record.class_names) != names:
        raise ConfigError(
            f"probe={config.probe}: tells {list(record.class_names)} apart, zeroshot.classes has "
            f"{list(names)}; name the same classes in the same order, so that their words say what "
            "they mean"
        )
    probe = probe.requires_grad_(False).to(clip.device)
    return Head(names, probe.weight, probe.bias, config.zeroshot.label)


def read_states(
    config: Atlas, clip: Clip, spliced: Spliced, images: Images
) -> CachedStates | FreshStates:
    """Cached rows behind the last block; elsewhere the images go through the prefix once."""
    if spliced.cut.has_last_layer:
        progress = config.trainer.progress
        return CachedStates(clip, spliced.cut, images, config.data, n_mean=1, progress=progress)
    return FreshStates(clip, spliced.cut, images, config.data, n_mean=1)


def score_images(
    config: Atlas,
    clip: Clip,
    spliced: Spliced,
    images: Images,
    states: CachedStates | FreshStates,
    classes: Classes,
) -> Scored:
    """Embeddings by the scorer, from its cache; of the explained model itself, no second pass."""
    chosen = config.scorer
    is_same = (chosen.name, chosen.pretrained, chosen.precision) == (
        config.model.name,
        config.model.pretrained,
        config.model.precision,
    )
    scorer = clip if is_same else load_model(chosen, config.trainer.accelerator)
    embeddings = torch.full((len(images.usable), scorer.d_embed), torch.nan)
    if is_same and isinstance(states, CachedStates):
        with torch.no_grad():
            for x, rows, rest in states:
                found = spliced.cut.suffix(x.to(clip.device), rest)
                embeddings[rows] = found.float().cpu()
    else:
        progress = config.trainer.progress
        store = read_embeddings(scorer, images.usable, config.data, progress=progress)
        features = load_features(store)
        embeddings[features.images] = features.x
    texts = embed_texts(config, scorer, classes)
    return Scored(scorer, texts, normalize(embeddings, dim=1))


def embed_texts(config: Atlas, scorer: Clip, classes: Classes) -> Texts:
    """By the templates of the classes: a word and a class of one name are one text."""
    cache, progress = Path(config.data.cache) / "text", config.trainer.progress
    entries = config.atlas.vocabulary
    given = load_vocabulary(entries).words if entries else ()
    words = tuple(dict.fromkeys([*given, *classes.names.words]))

    def embed(names: list[str], templates: tuple[str, ...]) -> Tensor:
        head = text_head(scorer, names, templates=templates, cache=cache, progress=progress)
        return head.weights.cpu()

    of_words = embed(list(words), classes.templates)
    place = {word: row for row, word in enumerate(words)}
    rows = [place[word] for word in classes.names.words]
    distinct = list(dict.fromkeys(classes.names.words))
    written = embed(distinct, (WRITTEN,))
    return Texts(
        names=classes.names.names,
        words=words,
        of_words=of_words,
        of_classes=of_words[rows],
        of_written=written[[distinct.index(word) for word in classes.names.words]],
        empty=embed_prompts(scorer, [""])[0].cpu(),
        class_words=tuple(classes.names.words),
    )


def read_classes(config: Atlas, classes: Classes, images: Images) -> Int[Tensor, " image"] | None:
    """The label of every image, or None where there is none."""
    if config.zeroshot.label is None:
        return None
    return classes.read_labels(images.usable, config.zeroshot.label)

"""What every job on a frozen CLIP starts with: the model, its cut, and cached activations."""

from pathlib import Path
from typing import NamedTuple

from clipattr.clip import Clip, Cut, Site, image_tower, load_clip
from clipattr.config.schema import ModelConfig, ReadConfig, SiteConfig
from clipattr.data import (
    ActivationStore,
    BadSample,
    Ranks,
    ShardIndex,
    build_index,
    cache_activations,
    find_shards,
    select_usable,
)
from clipattr.data.features import Encode
from clipattr.data.pixels import Pixels
from clipattr.training.trainer import choose_accelerator


class FrozenClip(NamedTuple):
    """A loaded model, cut at a site."""

    clip: Clip
    cut: Cut


class Images(NamedTuple):
    """The usable samples of some shards, and a report of the others."""

    usable: ShardIndex
    bad: list[BadSample]


def load_frozen(model: ModelConfig, site: SiteConfig, accelerator: str) -> FrozenClip:
    """Load the model of a config and cut its image tower."""
    clip = load_model(model, accelerator)
    named = Site(site.layer, site.stream.name, site.tokens.name)
    return FrozenClip(clip, image_tower(clip.model).cut(named))


def load_model(model: ModelConfig, accelerator: str) -> Clip:
    """Load the model of a config onto the device that the trainer will use."""
    device = "cuda" if choose_accelerator(accelerator) == "gpu" else "cpu"
    return load_clip(
        model.name,
        pretrained=model.pretrained,
        precision=model.precision.name,
        device=device,
    )


def find_images(
    shards: str,
    data: ReadConfig,
    needed: tuple[str, ...] = (),
    *,
    setting: str = "data.shards",
    progress: bool,
) -> Images:
    """The images of the shards that have all needed fields."""
    index = build_index(
        find_shards(shards, setting),
        cache=Path(data.cache),
        workers=data.workers,
        progress=progress,
    )
    return Images(*select_usable(index, needed, data.max_bad_fraction))


def read_activations(
    frozen: FrozenClip,
    index: ShardIndex,
    data: ReadConfig,
    *,
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool,
) -> ActivationStore:
    """The activations of the images at the site, from the cache where they are there."""
    clip, cut = frozen
    site = cut.site.to_json()
    return _cache(clip, cut.read, site, cut.d_site, index, data, ranks=ranks, progress=progress)


def read_embeddings(
    clip: Clip, index: ShardIndex, data: ReadConfig, *, progress: bool
) -> ActivationStore:
    """The un-normalised image embeddings of any model: no tower is cut."""
    site: dict[str, str | int] = {"stream": "embedding"}
    return _cache(clip, clip.encode_image, site, clip.d_embed, index, data, progress=progress)


def _cache(
    clip: Clip,
    encode: Encode,
    site: dict[str, str | int],
    width: int,
    index: ShardIndex,
    data: ReadConfig,
    *,
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool,
) -> ActivationStore:
    return cache_activations(
        index,
        encode,
        Pixels(clip.preprocess),
        made_from={"weights": clip.weights_sha256, "site": site},
        width=width,
        dtype=data.cache_dtype.name,
        folder=Path(data.cache),
        batch_size=data.batch_size,
        workers=data.workers,
        max_bad_fraction=data.max_bad_fraction,
        device=clip.device,
        ranks=ranks,
        progress=progress,
    )

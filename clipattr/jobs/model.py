"""What every job on a frozen CLIP starts with: the model, its cut, and cached activations."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from clipattr.clip import Clip, Cut, Site, Tower, image_tower, load_clip
from clipattr.config.inputs import ModelConfig, ReadConfig, SiteConfig, check_target
from clipattr.data import ActivationStore, Ranks, ShardIndex, cache_activations
from clipattr.data.features import Encode, SiteRows
from clipattr.data.pixels import Pixels
from clipattr.data.store import hash_json
from clipattr.errors import ConfigError
from clipattr.jobs.shards import count_workers
from clipattr.training.trainer import choose_accelerator

# What the cache calls an embedding.
_EMBEDDING = {"stream": "embedding"}


class SiteTokens(NamedTuple):
    """A site, how many tokens an image has there, and how many of them are drawn; None: all."""

    cut: Cut
    tokens: int
    drawn: int | None


class FrozenClip(NamedTuple):
    """A loaded model, and the site at which it is read."""

    clip: Clip
    site: SiteTokens
    target: SiteTokens | None = None
    """the site that a transcoder reconstructs from the first one"""

    @property
    def cut(self) -> Cut:
        """The tower in two halves."""
        return self.site.cut


def load_frozen(
    model: ModelConfig, site: SiteConfig, accelerator: str, target: SiteConfig | None = None
) -> FrozenClip:
    """Load the model of a config and cut its image tower."""
    clip = load_model(model, accelerator)
    tower = image_tower(clip.model)
    found = find_site(tower, site)
    if target is None:
        return FrozenClip(clip, found)
    try:
        found_target = find_site(tower, target)
    except ConfigError as error:
        raise ConfigError(f"target: {error}") from error
    # As the tower counts layers: the config alone cannot compare 11 with -1.
    resolved = (
        replace(one, layer=there.cut.site.layer)
        for one, there in ((site, found), (target, found_target))
    )
    check_target(*resolved)
    return FrozenClip(clip, found, found_target)


def find_site(tower: Tower, site: SiteConfig) -> SiteTokens:
    """A site of the tower; ConfigError where it has none, or fewer tokens than shall be drawn."""
    cut = tower.cut(Site(site.layer, site.stream.name, site.tokens.name))
    tokens = tower.count_tokens(cut.site.tokens)
    drawn = site.tokens_per_image
    if drawn is not None and drawn > tokens:
        raise ConfigError(
            f"site.tokens_per_image={drawn}: the tower has {tokens} tokens ({cut.site.tokens}) per "
            "image"
        )
    return SiteTokens(cut, tokens, drawn)


def load_model(model: ModelConfig, accelerator: str) -> Clip:
    """Load the model of a config onto the device that the trainer will use."""
    return load_clip(
        model.name,
        pretrained=model.pretrained,
        precision=model.precision.name,
        device=choose_device(accelerator),
    )


def choose_device(accelerator: str) -> str:
    """cpu, or the GPU of this process: the launchers number those of a machine."""
    if choose_accelerator(accelerator) == "cpu":
        return "cpu"
    found = (os.environ.get(name) for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return f"cuda:{next((rank for rank in found if rank is not None), '0')}"


def read_activations(
    frozen: FrozenClip,
    index: ShardIndex,
    data: ReadConfig,
    *,
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool,
) -> ActivationStore:
    """The activations of the images at the site, from the cache where they are there.

    With a target its activations are the column y of the same rows. Both come from one pass, and
    are not put together from caches of the two sites, whose rows may have other orders.
    """
    clip, site, target = frozen
    if target is None:
        encode = SiteEncoder({"x": site})
        return read_sites(clip, encode, index, data, ranks=ranks, progress=progress)["x"]
    encode = SiteEncoder({"x": site, "y": target})
    made_from = _made_from(clip, site.cut.site.to_json()) | {"target": target.cut.site.to_json()}
    beside = {"y": target.cut.d_site}
    rows = {"x": SiteRows(made_from, site.cut.d_site, site.tokens, site.drawn, beside)}
    return _cache(clip, encode, rows, index, data, ranks=ranks, progress=progress)["x"]


class SiteEncoder:
    """Reads sites of one image tower, in one pass over an image for all that are wanted."""

    def __init__(self, sites: Mapping[str, SiteTokens]) -> None:
        self.sites = sites
        self.n_images = 0
        self._tower = Tower(next(iter(sites.values())).cut.trunk)

    def __call__(
        self, images: Float[Tensor, "batch channel height width"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Activations at the sites of these names."""
        self.n_images += len(images)
        wanted = {name: self.sites[name].cut.site for name in names}
        found = self._tower.capture(images, list(wanted.values()))
        return {name: found[site] for name, site in wanted.items()}


def read_sites(
    clip: Clip,
    encode: SiteEncoder,
    index: ShardIndex,
    data: ReadConfig,
    *,
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool,
) -> dict[str, ActivationStore]:
    """As `read_activations`, at several sites: CLIP runs once per image for all that are missing.

    A row is what `cut.read` gives at its site: bit for bit, or to rounding where the stream `heads`
    of its block or of one in front of it is read as well, because heads are computed apart.
    """
    rows = {
        name: SiteRows(_made_from(clip, _describe(cut.site)), cut.d_site, tokens, drawn)
        for name, (cut, tokens, drawn) in encode.sites.items()
    }
    return _cache(clip, encode, rows, index, data, ranks=ranks, progress=progress)


def read_embeddings(
    clip: Clip,
    index: ShardIndex,
    data: ReadConfig,
    *,
    ranks: Ranks = Ranks(),  # noqa: B008  immutable
    progress: bool,
) -> ActivationStore:
    """The un-normalised image embeddings of any model: no tower is cut."""

    def encode(images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: clip.encode_image(images) for name in names}

    rows = {"x": SiteRows(_made_from(clip, _EMBEDDING), clip.d_embed)}
    return _cache(clip, encode, rows, index, data, ranks=ranks, progress=progress)["x"]


def embeddings_fingerprint(clip: Clip, index: ShardIndex, data: ReadConfig) -> str:
    """What a probe of the embeddings of these images says of its data; none is read."""
    pixels = Pixels(clip.preprocess, data.decode.name).fingerprint
    made = _made_from(clip, _EMBEDDING)
    return hash_json({**made, "preprocess": pixels, "images": index.fingerprint})


def _describe(site: Site) -> Mapping[str, str | int]:
    """Embeddings have one name, whether a tower was cut for them or not."""
    return _EMBEDDING if site.stream == "embedding" else site.to_json()


def _made_from(clip: Clip, site: Mapping[str, str | int]) -> dict[str, object]:
    return {"weights": clip.weights_sha256, "site": site}


def _cache(
    clip: Clip,
    encode: Encode,
    sites: Mapping[str, SiteRows],
    index: ShardIndex,
    data: ReadConfig,
    *,
    ranks: Ranks,
    progress: bool,
) -> dict[str, ActivationStore]:
    return cache_activations(
        index,
        encode,
        Pixels(clip.preprocess, data.decode.name),
        sites=sites,
        dtype=data.cache_dtype.name,
        folder=Path(data.cache),
        batch_size=data.batch_size,
        workers=count_workers(data, ranks.local_world_size),
        max_bad_fraction=data.max_bad_fraction,
        device=clip.device,
        ranks=ranks,
        progress=progress,
    )

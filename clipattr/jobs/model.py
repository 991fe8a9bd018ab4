"""What every job on a frozen CLIP starts with: the model, its cut, and cached activations."""

from pathlib import Path
from typing import NamedTuple

from clipattr.clip import Clip, Cut, Site, image_tower, load_clip
from clipattr.config.schema import ModelConfig, ReadConfig, SiteConfig
from clipattr.data import FeatureStore, Sample, cache_features, find_shards, index_shards
from clipattr.data.shards import BadSample, keep_complete
from clipattr.training.trainer import choose_accelerator


class FrozenClip(NamedTuple):
    """A loaded model, cut at a site."""

    clip: Clip
    cut: Cut

    def made_from(self) -> dict[str, object]:
        """What decides an activation besides the image."""
        return {
            "weights": self.clip.weights_sha256,
            "site": self.cut.site.to_json(),
        }


class Features(NamedTuple):
    """Samples with their activations: row r of `store` belongs to `samples[r]`."""

    samples: list[Sample]
    store: FeatureStore
    bad: list[BadSample]


def load_frozen(model: ModelConfig, site: SiteConfig, accelerator: str) -> FrozenClip:
    """Load the model of a config and cut its image tower."""
    clip = load_model(model, accelerator)
    named = Site(site.layer, site.stream.name, site.tokens.name)
    return FrozenClip(clip, image_tower(clip.model).cut(named))


def read_features(
    frozen: FrozenClip,
    shards: str,
    data: ReadConfig,
    needed: tuple[str, ...],
    *,
    setting: str = "data.shards",
    progress: bool,
) -> Features:
    """The activations of all usable images of the shards, from the cache where they are there."""
    samples, incomplete = keep_complete(
        index_shards(find_shards(shards, setting)), needed, data.max_bad_fraction
    )
    store = cache_features(
        samples,
        frozen.cut.read,
        frozen.clip.preprocess,
        made_from=frozen.made_from(),
        folder=Path(data.cache),
        batch_size=data.batch_size,
        workers=data.workers,
        max_bad_fraction=data.max_bad_fraction,
        device=frozen.clip.device,
        progress=progress,
    )
    kept = [samples[row] for row in store.image_rows.tolist()]
    return Features(kept, store, incomplete + store.bad)


def load_model(model: ModelConfig, accelerator: str) -> Clip:
    """Load the model of a config onto the device that the trainer will use."""
    device = "cuda" if choose_accelerator(accelerator) == "gpu" else "cpu"
    return load_clip(
        model.name,
        pretrained=model.pretrained,
        precision=model.precision.name,
        device=device,
    )


def read_embeddings(
    clip: Clip, samples: list[Sample], data: ReadConfig, *, progress: bool
) -> FeatureStore:
    """The un-normalised image embeddings of the samples, of any model: no tower is cut."""
    return cache_features(
        samples,
        clip.encode_image,
        clip.preprocess,
        made_from={
            "weights": clip.weights_sha256,
            "precision": clip.precision,
            "site": {"stream": "embedding"},
        },
        folder=Path(data.cache),
        batch_size=data.batch_size,
        workers=data.workers,
        max_bad_fraction=data.max_bad_fraction,
        device=clip.device,
        progress=progress,
    )

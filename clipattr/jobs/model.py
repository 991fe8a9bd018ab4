"""What every job on a frozen CLIP starts with: the model, its tower, and cached activations."""

from pathlib import Path
from typing import NamedTuple

from clipattr.clip import Clip, Site, Tower, load_clip
from clipattr.config.schema import ModelConfig, ReadConfig, SiteConfig
from clipattr.data import FeatureStore, Sample, cache_features, find_shards, index_shards
from clipattr.data.shards import BadSample, keep_complete
from clipattr.training.trainer import choose_accelerator


class FrozenClip(NamedTuple):
    """A loaded model, cut at a site."""

    clip: Clip
    tower: Tower

    def made_from(self) -> dict[str, object]:
        """What decides an activation besides the image."""
        return {
            "weights": self.clip.weights_sha256,
            "site": self.tower.site.to_json(),
        }


class Features(NamedTuple):
    """Samples with their activations: row r of `store` belongs to `samples[r]`."""

    samples: list[Sample]
    store: FeatureStore
    bad: list[BadSample]


def load_frozen(model: ModelConfig, site: SiteConfig, accelerator: str) -> FrozenClip:
    """Load the model of a config onto the device that the trainer will use."""
    device = "cuda" if choose_accelerator(accelerator) == "gpu" else "cpu"
    clip = load_clip(model.name, pretrained=model.pretrained, device=device)
    named = Site(site.layer, site.stream.name, site.tokens.name)
    return FrozenClip(clip, Tower(clip.model, named))


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
        frozen.tower.prefix,
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

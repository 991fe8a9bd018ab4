"""What the world's evaluation reads: model, SAE, probe, and the rows of each split."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.config.schema import EvaluateWorld, SiteConfig
from clipattr.data import load_features
from clipattr.data.shards import Sample, read_json
from clipattr.data.store import hash_json
from clipattr.errors import CheckpointError, ConfigError, DataError
from clipattr.jobs.model import FrozenClip, load_frozen, read_activations
from clipattr.jobs.shards import find_images
from clipattr.probes.files import load_probe
from clipattr.probes.linear import LinearProbe
from clipattr.sae.files import load_sae
from clipattr.spliced import Spliced
from clipattr.world.factors import Scene
from clipattr.world.prompts import TASK_CLASSES, Factors
from clipattr.world.sampling import Split


@dataclass(frozen=True)
class SplitRows:
    """One split: samples, their factors and their activations, row by row."""

    samples: list[Sample]
    factors: list[Factors]
    x: Float[Tensor, "row model"]
    fingerprint: str

    def where(self, is_true: Callable[[Factors], bool]) -> Bool[Tensor, " row"]:
        """The rows whose factors fulfil a condition."""
        return torch.tensor([is_true(factors) for factors in self.factors])


@dataclass(frozen=True)
class WorldData:
    """Everything that is evaluated."""

    frozen: FrozenClip
    spliced: Spliced
    probe: LinearProbe
    test: SplitRows
    task_test: SplitRows
    pairs: SplitRows

    @torch.no_grad()
    def embeddings(self, rows: Float[Tensor, "row model"]) -> Float[Tensor, "row embed"]:
        """L2-normalised image embeddings."""
        return normalize(self.frozen.cut.suffix(rows.to(self.frozen.clip.device)), dim=-1)


def load_world(config: EvaluateWorld) -> WorldData:
    """Load and check everything; an SAE or a probe of another model is refused."""
    frozen = load_frozen(config.model, SiteConfig(), config.trainer.accelerator)
    model = {"name": config.model.name, "weights_sha256": frozen.clip.weights_sha256}
    site = frozen.cut.site.to_json()
    sae, _ = load_sae(Path(config.sae), site, model, one_site=True)
    if config.evaluation.overlap_top >= sae.max_active:
        raise ConfigError(
            f"evaluation.overlap_top={config.evaluation.overlap_top}: must be below the "
            f"{sae.max_active} active latents of {config.sae}; the overlap of all says nothing"
        )
    probe, record = load_probe(Path(config.probe), model)
    if tuple(record.class_names) != TASK_CLASSES:
        raise CheckpointError(
            f"probe={config.probe!r} tells {record.class_names} apart; this evaluation needs a "
            f"probe of {list(TASK_CLASSES)}, in this order"
        )
    device = frozen.clip.device
    return WorldData(
        frozen=frozen,
        spliced=Spliced(frozen.cut, sae.requires_grad_(False).to(device)),
        probe=probe.requires_grad_(False).to(device),
        test=_read_split(frozen, config, Split.test),
        task_test=_read_split(frozen, config, Split.task_test),
        pairs=_read_split(frozen, config, Split.task_pairs),
    )


def split_folder(config: EvaluateWorld, split: Split) -> str:
    """Where the shards of a split lie."""
    return str(Path(config.world) / split.name)


def _read_split(frozen: FrozenClip, config: EvaluateWorld, split: Split) -> SplitRows:
    progress = config.trainer.progress
    index, _ = find_images(
        split_folder(config, split), config.data, ("json",), setting="world", progress=progress
    )
    store = read_activations(frozen, index, config.data, progress=progress)
    x, images = load_features(store)
    samples = [index[row] for row in images.tolist()]
    factors = [read_json(sample) for sample in samples]
    needed = {entry.name for entry in fields(Scene)} | {"noun", "caption"}
    if split is Split.task_pairs:
        needed |= {"pair", "variant"}
    for sample, found in zip(samples, factors, strict=True):
        if not needed <= found.keys():
            raise DataError(
                f"{sample.shard}: {sample.key}.json lacks {sorted(needed - found.keys())}; this "
                "job reads shards that render_world has written"
            )
    return SplitRows(samples, factors, x, hash_json(store.fingerprint))

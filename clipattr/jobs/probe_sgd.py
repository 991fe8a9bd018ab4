"""Heads that are trained in batches: one, or a grid of linear ones."""

from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.codes import SparseCodes
from clipattr.config.choices import HeadKind
from clipattr.config.schema import TrainProbe
from clipattr.data import ActivationStore, Ranks
from clipattr.data.store import hash_json
from clipattr.errors import ConfigError
from clipattr.jobs.probe_choice import Candidate
from clipattr.jobs.probe_convex import balance_classes
from clipattr.jobs.probe_features import FeatureReader, FeatureRows, Features
from clipattr.jobs.probe_sets import ProbeRows, ProbeSet
from clipattr.probes.features import EmbeddingPart
from clipattr.probes.files import Head
from clipattr.probes.heads import AttentionProbe, MlpProbe, absorb
from clipattr.probes.linear import LinearProbe
from clipattr.probes.sparse import SparseProbe
from clipattr.training.activations import ActivationDataModule
from clipattr.training.memory import MemoryDataModule
from clipattr.training.probe_grid import GridPoint, ProbeGridModule
from clipattr.training.probe_module import ProbeModule
from clipattr.training.trainer import build_trainer, fit

# Rows whose moments are added up at a time, in float64.
_BLOCK = 4096


def fit_sgd(
    config: TrainProbe,
    reader: FeatureReader,
    labelled: ProbeSet,
    heads: list[Head],
    read: ProbeRows | None,
    folder: Path,
) -> list[Candidate] | None:
    """The trained heads, the grid in its order; None in all processes but the first.

    Args:
        config: of the job.
        reader: of the features.
        labelled: the images.
        heads: where the points of the grid start, as `build_heads` makes them.
        read: the rows, where one process has read them.
        folder: of the run.
    """
    settings = config.probe
    points = [GridPoint(*one) for one in settings.grid]
    module = _module(config, heads, points, labelled)
    rows = _MemoryRows(config, reader, labelled, read)
    is_stored = len(reader.spec.parts) == 1 and not settings.standardise
    is_stored &= isinstance(reader.spec.parts[0], EmbeddingPart)
    data = _stored(config, reader, labelled) if is_stored else rows.serve()
    trainer = build_trainer(config.trainer, folder)
    fit(trainer, module, data, folder)
    if not trainer.is_global_zero:
        return None
    return [
        Candidate(rows.absorb(head.cpu()), {"lr": point.lr, "weight_decay": point.weight_decay}, {})
        for head, point in zip(heads, points, strict=True)
    ]


def build_heads(config: TrainProbe, width: int, start: LinearProbe | None) -> list[Head]:
    """One for each point of the grid."""
    return [_build(config, width, start) for _ in config.probe.grid]


def check_batch(config: TrainProbe, n_rows: int) -> None:
    """Raise ConfigError where a step wants more rows than there are."""
    if n_rows < config.probe.batch_size:
        raise ConfigError(
            f"probe.batch_size={config.probe.batch_size}: data.shards={config.data.shards} has "
            f"{n_rows} usable images; choose a smaller batch"
        )


def _build(config: TrainProbe, width: int, start: LinearProbe | None) -> Head:
    settings = config.probe
    n_classes = len(settings.class_names)
    generator = torch.Generator().manual_seed(config.seed)
    match settings.head:
        case HeadKind.mlp:
            return MlpProbe(width, n_classes, hidden=settings.hidden, generator=generator)
        case HeadKind.attention:
            return AttentionProbe(width, n_classes, n_heads=settings.n_heads, generator=generator)
        case HeadKind.sparse:
            return SparseProbe(width, n_classes)
        case HeadKind.linear:
            probe = LinearProbe(width, n_classes)
            if start is not None:
                probe.load_state_dict(start.state_dict())
            return probe


def _module(
    config: TrainProbe, heads: list[Head], points: list[GridPoint], labelled: ProbeSet
) -> ProbeModule | ProbeGridModule:
    settings, n_steps = config.probe, config.trainer.steps
    n_classes = len(settings.class_names)
    weight = balance_classes(labelled.targets, n_classes, settings.class_weight)
    if len(points) > 1:
        probes = [head for head in heads if isinstance(head, LinearProbe)]
        return ProbeGridModule(probes, points, n_steps=n_steps, class_weight=weight)
    (head,), (point,) = heads, points
    return ProbeModule(
        head,
        lr=point.lr,
        weight_decay=point.weight_decay,
        n_steps=n_steps,
        class_weight=weight,
    )


def _stored(config: TrainProbe, reader: FeatureReader, labelled: ProbeSet) -> ActivationDataModule:
    """Embeddings are read from the cache as they are needed."""

    def open_store(ranks: Ranks) -> ActivationStore:
        progress = config.trainer.progress
        (store,) = reader.stores(
            labelled.images, config.data, ranks=ranks, progress=progress
        ).values()
        return store

    (part,) = reader.spec.parts
    assert isinstance(part, EmbeddingPart), "of which one row per image is stored"
    return ActivationDataModule(
        open_store,
        batch_size=config.probe.batch_size,
        seed=config.seed,
        n_steps=config.trainer.steps,
        fields=("x", "images"),
        finish=partial(_with_targets, labelled.targets, part.is_normalised),
    )


def _with_targets(
    targets: Tensor, is_normalised: bool, x: Float[Tensor, "row embed"], images: Tensor
) -> tuple[Tensor, Tensor]:
    x = normalize(x.float(), dim=-1) if is_normalised else x.float()
    return x, targets.to(images.device)[images.long()]


class _MemoryRows:
    """Features that are put together of several stores, or of tokens, are held in memory."""

    def __init__(
        self,
        config: TrainProbe,
        reader: FeatureReader,
        labelled: ProbeSet,
        read: ProbeRows | None,
    ) -> None:
        self.config, self.reader, self.labelled, self.read = config, reader, labelled, read
        self._moments: tuple[Tensor, Tensor] | None = None

    def serve(self) -> MemoryDataModule:
        """As batches of (features, targets)."""
        spec, index = str(self.reader.spec), self.labelled.images.usable
        return MemoryDataModule(
            self._load,
            batch_size=self.config.probe.batch_size,
            seed=self.config.seed,
            n_steps=self.config.trainer.steps,
            identity=hash_json([spec, index.fingerprint, self.reader.clip.weights_sha256]),
            finish=self._finish,
        )

    def absorb(self, head: Head) -> Head:
        """The head of raw features."""
        if self._moments is None or isinstance(head, SparseProbe):
            return head
        return absorb(head, *self._moments)  # pyright: ignore[reportArgumentType]  one of its kinds

    def _load(self, ranks: Ranks) -> tuple[Tensor, ...]:
        found = self._read(ranks)
        targets = self.labelled.targets[found.images]
        if isinstance(found.x, SparseCodes):
            return found.x.indices, found.x.values, targets
        if self.config.probe.standardise:
            self._moments = measure_standard(found.x)
        return found.x, targets

    def _read(self, ranks: Ranks) -> FeatureRows:
        if self.read is not None:
            return self.read.found
        images, data = self.labelled.images, self.config.data
        progress = self.config.trainer.progress
        return self.reader.of_shards(images, data, ranks=ranks, progress=progress)

    def _finish(self, *columns: Tensor) -> tuple[Features, Tensor]:
        *x, targets = columns
        if len(x) == 2:
            return SparseCodes(x[0], x[1], self.reader.width), targets
        features = x[0].float()
        if self._moments is not None:
            shift, factor = (each.to(features.device) for each in self._moments)
            features = (features - shift) * factor
        return features, targets


def measure_standard(
    x: Float[Tensor, "image *token width"],
) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    """(shift, factor): mean, and 1 / standard deviation; 1 where a feature never varies."""
    rows = x.flatten(0, -2)
    blocks = rows.split(_BLOCK)
    mean = sum((one.double().sum(0) for one in blocks), torch.zeros(x.shape[-1]).double())
    mean /= len(rows)
    squares = sum(
        ((one.double() - mean).square().sum(0) for one in blocks), torch.zeros(1).double()
    )
    spread = (squares / len(rows)).sqrt()
    factor = torch.where(spread > 0, 1 / spread, 1)
    return mean.float(), factor.float()

"""What the latents mean, on disk: atlas.safetensors, and atlas.json, which says by whose eyes.

For the steps that come after: `find` compares queries with the means, `explain` shows the labels.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.files import SCHEMA_VERSION, check_field, check_model, load_weights, save_weights

STEM = "atlas"
_TENSORS = {"means": 2, "labels": 2, "label_scores": 2, "examples": 2, "activations": 2}


@dataclass(frozen=True)
class AtlasOrigin:
    """Of which SAE, and with what it was described."""

    model: dict[str, str]
    """name and weights_sha256 of the explained model"""
    sae: str
    """sha256 of the SAE's weights"""
    site: dict[str, str | int]
    scorer: dict[str, str | None]
    """name, pretrained, precision and weights_sha256 of the semantic scorer"""
    words: list[str]
    """the vocabulary, to which `labels` refer"""
    templates: list[str]
    shards: str
    """the images, to whose index `examples` refer"""
    images: str
    """fingerprint of that index"""
    n_examples: int
    """how many of the examples define the meaning"""


class AtlasTensors(NamedTuple):
    """One row per latent; nan and -1 where it never fired."""

    means: Float[Tensor, "latent embed"]
    """mean unit embedding of its images by the scorer"""
    labels: Int[Tensor, "latent n_labels"]
    label_scores: Float[Tensor, "latent n_labels"]
    examples: Int[Tensor, "latent n"]
    """its images, strongest first"""
    activations: Float[Tensor, "latent n"]


class Atlas(NamedTuple):
    """The tensors and where they come from."""

    tensors: AtlasTensors
    origin: AtlasOrigin

    def words_of(self, latent: int) -> list[tuple[str, float]]:
        """Labels of a latent with their scores, best first; none of one that never fired."""
        rows, scores = self.tensors.labels[latent].tolist(), self.tensors.label_scores[latent]
        return [
            (self.origin.words[row], float(score))
            for row, score in zip(rows, scores, strict=True)
            if row >= 0
        ]


_FIELDS = tuple(each.name for each in fields(AtlasOrigin))


def save_atlas(atlas: Atlas, folder: Path | str) -> None:
    """Write folder/atlas.safetensors and folder/atlas.json, each atomically."""
    tensors = atlas.tensors._asdict()
    _check(Path(folder) / f"{STEM}.safetensors", tensors, atlas.origin)
    save_weights(Path(folder), STEM, tensors, asdict(atlas.origin))


def load_atlas(
    folder: Path | str,
    expected_model: Mapping[str, str] | None = None,
    expected_sae: str | None = None,
) -> Atlas:
    """Read them onto the CPU; anything missing, unexpected or of other weights is refused.

    `expected_sae` is the sha256 of the SAE's weights: `clipattr.files.read_sha256(folder, "sae")`.
    """
    folder = Path(folder)
    tensors, found = load_weights(folder, STEM, {SCHEMA_VERSION: frozenset(_FIELDS)})
    if expected_model is not None:
        check_model(folder / f"{STEM}.json", found["model"], expected_model)
    if expected_sae is not None:
        check_field(
            folder / f"{STEM}.json", "sha256 of its SAE's weights", found["sae"], expected_sae
        )
    origin = AtlasOrigin(**{name: found[name] for name in _FIELDS})
    _check(folder / f"{STEM}.safetensors", tensors, origin)
    return Atlas(AtlasTensors(**tensors), origin)


def _check(path: Path, tensors: Mapping[str, Tensor], origin: AtlasOrigin) -> None:
    """Raise CheckpointError unless names, shapes and references are those of an atlas."""
    if tensors.keys() != _TENSORS.keys():
        raise CheckpointError(f"{path}: holds {sorted(tensors)}, expected {sorted(_TENSORS)}")
    n_latents = len(tensors["means"])
    for name, axes in _TENSORS.items():
        check_field(path, f"axes of {name}", tensors[name].ndim, axes)
        check_field(path, f"rows of {name}", len(tensors[name]), n_latents)
    for one, other in (("labels", "label_scores"), ("examples", "activations")):
        shapes = [list(tensors[name].shape) for name in (one, other)]
        check_field(path, f"shape of {one}", *shapes)
    labels = tensors["labels"]
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < len(origin.words):
        raise CheckpointError(
            f"{path}: a label refers to word {int(labels.max())}; there are {len(origin.words)}"
        )
    if tensors["means"].dtype != torch.float32:
        check_field(path, "dtype of means", str(tensors["means"].dtype), "torch.float32")

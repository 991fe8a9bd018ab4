"""On what each class relies, on disk: reliance.safetensors, and reliance.json, which says of what.

For the steps that come after an evaluation: how latents are labelled, and which reliance is
unexpected. The same numbers as a table for other programs: `clipattr.report.reliance`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.files import SCHEMA_VERSION, check_field, check_model, load_weights, save_weights

STEM = "reliance"
ALL_IMAGES, IMAGES_OF_CLASS = "all images", "images of the class"


@dataclass(frozen=True)
class RelianceOrigin:
    """Of which model, SAE and head, and over which images."""

    class_names: list[str]
    n_images: list[int]
    """images that the numbers of each class are over"""
    over: str
    """all images, or images of the class: those explained for it"""
    model: dict[str, str]
    """name, weights_sha256"""
    site: dict[str, str | int]
    sae: str
    head: dict[str, str]
    """which prompts, or which probe"""


class Reliance(NamedTuple):
    """The reliance of every class on every latent; the shares broadcast against the matrix."""

    mean_attribution: Float[Tensor, "class latent"]
    """0 for a class without images"""
    share_of_images: Float[Tensor, "*classes latent"]
    """of the images, share in which the latent fires: [latent] over all images, else by class"""
    share_positive: Float[Tensor, "class latent"] | None
    """of these, share with a positive attribution to the class; nan where the latent never fires"""
    origin: RelianceOrigin


_FIELDS = tuple(each.name for each in fields(RelianceOrigin))


def save_reliance(reliance: Reliance, folder: Path | str) -> None:
    """Write folder/reliance.safetensors and folder/reliance.json, each atomically."""
    tensors = {
        "mean_attribution": reliance.mean_attribution,
        "share_of_images": reliance.share_of_images,
    }
    if reliance.share_positive is not None:
        tensors["share_positive"] = reliance.share_positive
    path = Path(folder) / f"{STEM}.safetensors"
    _check(path, tensors, reliance.origin)
    save_weights(Path(folder), STEM, tensors, asdict(reliance.origin))


def load_reliance(folder: Path | str, expected_model: Mapping[str, str] | None = None) -> Reliance:
    """Read them onto the CPU; anything missing, unexpected or of another model is refused."""
    folder = Path(folder)
    tensors, found = load_weights(folder, STEM, {SCHEMA_VERSION: frozenset(_FIELDS)})
    if expected_model is not None:
        check_model(folder / f"{STEM}.json", found["model"], expected_model)
    origin = RelianceOrigin(**{name: found[name] for name in _FIELDS})
    _check(folder / f"{STEM}.safetensors", tensors, origin)
    return Reliance(
        tensors["mean_attribution"],
        tensors["share_of_images"],
        tensors.get("share_positive"),
        origin,
    )


def _check(path: Path, tensors: Mapping[str, Tensor], origin: RelianceOrigin) -> None:
    """Raise CheckpointError unless names and shapes are those of a class x latent table."""
    needed = {"mean_attribution", "share_of_images"}
    if tensors.keys() not in (needed, needed | {"share_positive"}):
        raise CheckpointError(
            f"{path}: holds {sorted(tensors)}, expected {sorted(needed)} and at most share_positive"
        )
    if origin.over not in (ALL_IMAGES, IMAGES_OF_CLASS):
        check_field(path, "over", origin.over, IMAGES_OF_CLASS)
    n_classes = len(origin.class_names)
    check_field(path, "number of n_images", len(origin.n_images), n_classes)
    shape = torch.Size((n_classes, *tensors["mean_attribution"].shape[1:]))
    check_field(path, "axes of mean_attribution", len(shape), 2)
    for name, tensor in tensors.items():
        is_row = name == "share_of_images" and origin.over == ALL_IMAGES
        expected = shape[1:] if is_row else shape
        check_field(path, f"shape of {name}", list(tensor.shape), list(expected))

"""A suppression on disk: what a repaired probe needs to be done to its input, beside the probe.

suppression.safetensors holds the latents and the activations that they are brought to;
suppression.json says in which SAE, at which site of which model.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from clipattr.errors import CheckpointError
from clipattr.files import check_model, load_weights, read_sha256, save_weights
from clipattr.shortcuts.repair import Suppression

FEATURE = "embedding, L2-normalised, after suppression"
"""What a probe that lies beside a suppression reads, in the words of its record."""

STEM = "suppression"
_SCHEMA = 1


@dataclass(frozen=True)
class SuppressionRecord:
    """Where the latents are. site: {layer, stream, tokens}; model: {name, weights_sha256}."""

    cue: str
    sae: str
    """folder of the SAE, as it was given"""
    sae_sha256: str
    n_latents: int
    site: dict[str, str | int]
    model: dict[str, str]


_FIELDS = frozenset(each.name for each in fields(SuppressionRecord))


def save_suppression(folder: Path | str, found: Suppression, record: SuppressionRecord) -> None:
    """Write folder/suppression.safetensors and folder/suppression.json, each atomically."""
    tensors = {"latents": found.latents.long(), "means": found.means.float()}
    save_weights(Path(folder), STEM, tensors, asdict(record), _SCHEMA)


def load_suppression(
    folder: Path | str, expected_model: Mapping[str, str] | None = None
) -> tuple[Suppression, SuppressionRecord]:
    """Read a suppression onto the CPU; whatever does not fit together is refused."""
    folder = Path(folder)
    path = folder / f"{STEM}.json"
    tensors, found = load_weights(folder, STEM, {_SCHEMA: _FIELDS})
    if type(found["n_latents"]) is not int or found["n_latents"] < 1:
        raise CheckpointError(f"{path}: n_latents is {found['n_latents']!r}, expected a number")
    for name in ("cue", "sae", "sae_sha256"):
        if not isinstance(found[name], str):
            raise CheckpointError(f"{path}: {name} is {found[name]!r}, expected text")
    if expected_model is not None:
        check_model(path, found["model"], expected_model)
    suppression = _read_tensors(path.with_suffix(".safetensors"), tensors, found["n_latents"])
    return suppression, SuppressionRecord(**{name: found[name] for name in _FIELDS})


def check_sae(folder: Path | str, record: SuppressionRecord, sae: Path | str) -> None:
    """Raise CheckpointError unless the latents are those of the SAE in the folder `sae`."""
    path = Path(folder) / f"{STEM}.json"
    sha256 = read_sha256(Path(sae), "sae")
    if sha256 != record.sae_sha256:
        raise CheckpointError(
            f"{path}: its latents are those of the SAE {record.sae} with the sha256 "
            f"{record.sae_sha256}, {sae} has {sha256}"
        )


def _read_tensors(path: Path, found: Mapping[str, Tensor], n_latents: int) -> Suppression:
    if found.keys() != {"latents", "means"}:
        raise CheckpointError(f"{path}: tensors are {sorted(found)}, expected latents and means")
    latents, means = found["latents"], found["means"]
    if latents.ndim != 1 or latents.dtype != torch.int64 or len(latents) == 0:
        raise CheckpointError(
            f"{path}: latents are {latents.dtype} {list(latents.shape)}, expected a list of int64"
        )
    if means.dtype != torch.float32 or means.shape != latents.shape:
        raise CheckpointError(
            f"{path}: means are {means.dtype} {list(means.shape)}, expected torch.float32 "
            f"{list(latents.shape)}"
        )
    if not bool(means.isfinite().all()):
        raise CheckpointError(f"{path}: means hold nan or infinity")
    numbers = latents.tolist()
    if len(set(numbers)) != len(numbers) or not all(0 <= one < n_latents for one in numbers):
        raise CheckpointError(
            f"{path}: latents are {numbers}, expected each once, between 0 and {n_latents - 1}"
        )
    return Suppression(latents, means)

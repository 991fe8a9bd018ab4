"""An SAE on disk: sae.safetensors and sae.json. Says for which model and site it was trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipattr.errors import CheckpointError, ConfigError
from clipattr.files import check_field, check_model, check_tensors, load_weights, save_weights
from clipattr.sae.topk import TopKSae

_STEM = "sae"
_ARCHITECTURE = "topk"
# How the raw activation is normalised before the encoder; the values travel as tensors.
_NORMALISATION = {"centre": "b_dec", "scale": "input_scale"}


@dataclass(frozen=True)
class SaeRecord:
    """Where an SAE comes from. `site.layer` is a resolved block number, never counted from the end.

    site: {layer, stream, tokens}; model: {name, weights_sha256}.
    """

    site: dict[str, str | int]
    model: dict[str, str]
    data_fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a record that does not say for what the SAE was made."""
        for name, found, expected in (
            ("site", set(self.site), {"layer", "stream", "tokens"}),
            ("model", set(self.model), {"name", "weights_sha256"}),
        ):
            if found != expected:
                raise CheckpointError(
                    f"SaeRecord.{name} has keys {sorted(found)}, expected {sorted(expected)}"
                )


_SIZES = ("d_model", "n_latents", "k")
_RECORD_FIELDS = tuple(each.name for each in fields(SaeRecord))
_FIELDS = frozenset({"architecture", "normalisation", *_SIZES, *_RECORD_FIELDS})


def save_sae(sae: TopKSae, folder: Path | str, record: SaeRecord) -> None:
    """Write folder/sae.safetensors and folder/sae.json, each atomically."""
    sizes = {name: getattr(sae, name) for name in _SIZES}
    description = {"architecture": _ARCHITECTURE, **sizes, "normalisation": _NORMALISATION}
    save_weights(Path(folder), _STEM, sae.state_dict(), {**description, **asdict(record)})


def load_sae(
    folder: Path | str,
    expected_site: Mapping[str, str | int] | None = None,
    expected_model: Mapping[str, str] | None = None,
) -> tuple[TopKSae, SaeRecord]:
    """Read an SAE onto the CPU; anything missing, unexpected or of another origin is refused."""
    folder = Path(folder)
    path = folder / f"{_STEM}.json"
    tensors, found = load_weights(folder, _STEM, _FIELDS)
    check_field(path, "architecture", found["architecture"], _ARCHITECTURE)
    check_field(path, "normalisation", found["normalisation"], _NORMALISATION)
    if expected_site is not None:
        check_field(path, "site", found["site"], dict(expected_site))
    if expected_model is not None:
        check_model(path, found["model"], expected_model)
    sae = _build(path, found, tensors)
    return sae, SaeRecord(**{name: found[name] for name in _RECORD_FIELDS})


def _build(path: Path, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TopKSae:
    sizes = {name: found[name] for name in _SIZES}
    if not all(isinstance(size, int) for size in sizes.values()):
        raise CheckpointError(f"{path}: sizes are {sizes}, expected whole numbers")
    try:
        # Its own generator: loading must not move the global random state.
        sae = TopKSae(**sizes, generator=torch.Generator())
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_tensors(path.with_suffix(".safetensors"), tensors, sae.state_dict())
    sae.load_state_dict(dict(tensors))
    return sae

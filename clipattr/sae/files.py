"""An SAE on disk: sae.safetensors and sae.json. Says for which model and site it was trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipattr.errors import CheckpointError, ConfigError
from clipattr.files import check_field, check_model, check_tensors, load_weights, save_weights
from clipattr.sae.imported import (
    RowScaledGatedSae,
    RowScaledJumpReluSae,
    RowScaledReluSae,
    RowScaledTopKSae,
    SignedTopKSae,
)
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.prefixes import MatryoshkaSae, NestedTopKSae
from clipattr.sae.relu import GatedSae, JumpReluSae, ReluSae
from clipattr.sae.sae import Sae
from clipattr.sae.topk import BatchTopKSae, TopKSae
from clipattr.sae.transcoder import Transcoder

_STEM = "sae"
_ARCHITECTURES: dict[str, type[Sae]] = {
    each.architecture: each
    for each in (
        TopKSae,
        BatchTopKSae,
        ReluSae,
        JumpReluSae,
        GatedSae,
        MatryoshkaSae,
        NestedTopKSae,
        Transcoder,
        SignedTopKSae,
        RowScaledTopKSae,
        RowScaledReluSae,
        RowScaledJumpReluSae,
        RowScaledGatedSae,
    )
}


@dataclass(frozen=True)
class SaeRecord:
    """Where an SAE comes from. `site.layer` is a resolved block number, never counted from the end.

    site: {layer, stream, tokens}; model: {name, weights_sha256}; target_site: as site, what a
    transcoder reconstructs.
    """

    site: dict[str, str | int]
    model: dict[str, str]
    data_fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)
    target_site: dict[str, str | int] | None = None

    def __post_init__(self) -> None:
        """Refuse a record that does not say for what the SAE was made."""
        _check_record(vars(self))


def _check_record(record: Mapping[str, Any]) -> None:
    place = {"layer", "stream", "tokens"}
    for name, expected in (
        ("site", place),
        ("model", {"name", "weights_sha256"}),
        ("target_site", place),
    ):
        found = record.get(name)
        if name == "target_site" and found is None:
            continue
        if not isinstance(found, dict) or set(found) != expected:
            keys = sorted(map(str, found)) if isinstance(found, dict) else repr(found)
            raise CheckpointError(f"SaeRecord.{name} has keys {keys}, expected {sorted(expected)}")
        for key, value in found.items():
            if type(value) is not (int if key == "layer" else str):
                raise CheckpointError(f"SaeRecord.{name}.{key} is {value!r}")
    metrics = record["metrics"]
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        raise CheckpointError(f"SaeRecord.metrics is {metrics!r}, expected numbers by name")


_RECORD_FIELDS = tuple(each.name for each in fields(SaeRecord))
_OLD_FIELDS = frozenset({"architecture", "normalisation", *_RECORD_FIELDS}) - {"target_site"}
_SCHEMA_VERSION = 3
_SCHEMAS = {
    # As it was when there was TopK alone, with its settings among the fields.
    1: _OLD_FIELDS | {*TopKSae.SETTINGS},
    # As it was when a transcoder named the site alone that it reads.
    2: _OLD_FIELDS | {"settings"},
    _SCHEMA_VERSION: _OLD_FIELDS | {"settings", "target_site"},
}
_FIRST_NORMALISATION = {"centre": "b_dec", "scale": "input_scale"}


def save_sae(sae: Sae, folder: Path | str, record: SaeRecord) -> None:
    """Write folder/sae.safetensors and folder/sae.json, each atomically.

    A standardised SAE is folded, so that W_dec of every file is in the units of x.
    """
    _check_target(Path(folder) / f"{_STEM}.json", sae.architecture, record.target_site)
    if sae.normalisation is Normalisation.standardise:
        sae = sae.fold()
    description = {
        "architecture": sae.architecture,
        "settings": {name: _to_json(value) for name, value in sae.settings.items()},
        "normalisation": sae.normalisation.value,
        **asdict(record),
    }
    save_weights(Path(folder), _STEM, sae.state_dict(), description, _SCHEMA_VERSION)


def load_sae(
    folder: Path | str,
    expected_site: Mapping[str, str | int] | None = None,
    expected_model: Mapping[str, str] | None = None,
    *,
    one_site: bool = False,
) -> tuple[Sae, SaeRecord]:
    """Read an SAE onto the CPU, for use (`eval`); whatever does not fit together is refused.

    With `one_site` that is also a transcoder, which reconstructs another site than it reads.
    """
    folder = Path(folder)
    path = folder / f"{_STEM}.json"
    tensors, found = load_weights(folder, _STEM, _SCHEMAS)
    if found["schema_version"] == 1:
        _translate_first(path, found)
    if found["schema_version"] == _SCHEMA_VERSION:
        _check_target(path, found["architecture"], found["target_site"])
    else:
        found["target_site"] = None
    _check_record(found)
    if one_site and found["architecture"] == Transcoder.architecture:
        raise CheckpointError(
            f"{path}: is a transcoder from {found['site']} to {found['target_site'] or 'a site'}; "
            "what reads it needs an autoencoder, which reconstructs the site that it reads"
        )
    if expected_site is not None:
        check_field(path, "site", found["site"], dict(expected_site))
    if expected_model is not None:
        check_model(path, found["model"], expected_model)
    sae = _build(path, found, tensors)
    return sae, SaeRecord(**{name: found[name] for name in _RECORD_FIELDS})


def _check_target(path: Path, architecture: object, target: object) -> None:
    is_transcoder = architecture == Transcoder.architecture
    if is_transcoder != (target is not None):
        wanted = "the site that it reconstructs" if is_transcoder else "null"
        raise CheckpointError(
            f"{path}: target_site is {target!r}, for architecture {architecture!r} it is {wanted}"
        )


def _translate_first(path: Path, found: dict[str, Any]) -> None:
    """A file of schema 1 in the words of the present one."""
    check_field(path, "architecture", found["architecture"], TopKSae.architecture)
    check_field(path, "normalisation", found["normalisation"], _FIRST_NORMALISATION)
    found["normalisation"] = Normalisation.scale.value
    found["settings"] = {name: found.pop(name) for name in TopKSae.SETTINGS}


def _build(path: Path, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sae:
    architecture = found["architecture"]
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture is {architecture!r}, expected one of {sorted(_ARCHITECTURES)}"
        )
    kind = _ARCHITECTURES[architecture]
    normalisation = _from_json(path, "normalisation", found["normalisation"], Normalisation)
    settings = _read_settings(path, found["settings"], kind.SETTINGS)
    # Before an SAE of that size is made.
    sizes = [settings["n_latents"], settings["d_model"]]
    if "W_enc" not in tensors:
        raise CheckpointError(f"{path.with_suffix('.safetensors')}: missing tensors ['W_enc']")
    if list(tensors["W_enc"].shape) != sizes:
        shape = list(tensors["W_enc"].shape)
        raise CheckpointError(f"{path}: settings are those of W_enc {sizes}, the file has {shape}")
    try:
        # Its own generator: loading must not move the global random state.
        sae = kind(**settings, normalisation=normalisation, generator=torch.Generator())
    except (ConfigError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_tensors(path.with_suffix(".safetensors"), tensors, sae.state_dict())
    sae.load_state_dict(dict(tensors))
    return sae.eval()


def _read_settings(path: Path, found: object, expected: Mapping[str, type]) -> dict[str, Any]:
    names = set(found) if isinstance(found, dict) else {repr(found)}
    if not isinstance(found, dict) or names != set(expected):
        raise CheckpointError(f"{path}: settings are {sorted(names)}, expected {sorted(expected)}")
    return {
        name: _from_json(path, f"settings.{name}", found[name], kind)
        for name, kind in expected.items()
    }


def _to_json(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _from_json(path: Path, name: str, value: Any, kind: type) -> Any:
    if issubclass(kind, Enum):
        allowed = [each.value for each in kind]
        if value not in allowed:
            raise CheckpointError(f"{path}: {name} is {value!r}, expected one of {allowed}")
        return kind(value)
    if kind is tuple:
        if not isinstance(value, list) or not value or not all(_is_number(each) for each in value):
            raise CheckpointError(f"{path}: {name} is {value!r}, expected a list of numbers")
        return tuple(value)
    # JSON writes 1.0 as a float and a bool is an int to Python: neither is the other here.
    if type(value) is not kind and not (kind is float and _is_number(value)):
        raise CheckpointError(f"{path}: {name} is {value!r}, expected {kind.__name__}")
    return kind(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

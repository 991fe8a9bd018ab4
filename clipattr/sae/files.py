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
    )
}


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


_RECORD_FIELDS = tuple(each.name for each in fields(SaeRecord))
_SCHEMA_VERSION = 2
_SCHEMAS = {
    # As it was when there was TopK alone, with its settings among the fields.
    1: frozenset({"architecture", "normalisation", *TopKSae.SETTINGS, *_RECORD_FIELDS}),
    _SCHEMA_VERSION: frozenset({"architecture", "normalisation", "settings", *_RECORD_FIELDS}),
}
_FIRST_NORMALISATION = {"centre": "b_dec", "scale": "input_scale"}


def save_sae(sae: Sae, folder: Path | str, record: SaeRecord) -> None:
    """Write folder/sae.safetensors and folder/sae.json, each atomically.

    A standardised SAE is folded, so that W_dec of every file is in the units of x.
    """
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
) -> tuple[Sae, SaeRecord]:
    """Read an SAE onto the CPU, for use (`eval`); whatever does not fit together is refused."""
    folder = Path(folder)
    path = folder / f"{_STEM}.json"
    tensors, found = load_weights(folder, _STEM, _SCHEMAS)
    if found["schema_version"] == 1:
        _translate_first(path, found)
    if expected_site is not None:
        check_field(path, "site", found["site"], dict(expected_site))
    if expected_model is not None:
        check_model(path, found["model"], expected_model)
    sae = _build(path, found, tensors)
    return sae, SaeRecord(**{name: found[name] for name in _RECORD_FIELDS})


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
    try:
        # Its own generator: loading must not move the global random state.
        sae = kind(**settings, normalisation=normalisation, generator=torch.Generator())
    except ConfigError as error:
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

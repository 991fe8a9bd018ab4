"""A probe on disk: probe.safetensors and probe.json, which says on what it was trained.

Schema 3 says whether classes exclude each other, which those of schema 2 always do, and what is
done to a picture; 2 names the kind of head and the settings it is built with; 1 had linear probes
alone. All can be read.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipattr.errors import CheckpointError, ConfigError
from clipattr.files import check_field, check_model, check_tensors, load_weights, save_weights
from clipattr.probes.features import EMBEDDING
from clipattr.probes.heads import AttentionProbe, MlpProbe
from clipattr.probes.linear import LinearProbe
from clipattr.probes.sparse import SparseProbe

Head = LinearProbe | MlpProbe | AttentionProbe | SparseProbe
"""What can be saved."""

_STEM = "probe"
_SCHEMA = 3


@dataclass(frozen=True)
class ProbeRecord:
    """Where a probe comes from: model {name, weights_sha256}, label field, class names in order."""

    class_names: list[str]
    model: dict[str, str]
    label_field: str
    data_fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)
    feature: str = EMBEDDING
    """what the head takes; `probes.features.parse_features` reads it"""
    is_multilabel: bool = False
    """whether each class is true or not by itself: its probability is a sigmoid"""
    preprocess: str = ""
    """what is done to a picture before the model, in words: the model's own transforms"""

    def __post_init__(self) -> None:
        """Refuse a record that does not say on what the probe was made."""
        if set(self.model) != {"name", "weights_sha256"}:
            raise CheckpointError(
                f"ProbeRecord.model has keys {sorted(self.model)}, "
                "expected ['name', 'weights_sha256']"
            )


_RECORD_FIELDS = tuple(each.name for each in fields(ProbeRecord))
_OLD_FIELDS = frozenset(_RECORD_FIELDS) - {"is_multilabel", "preprocess"}
_SCHEMAS = {
    1: _OLD_FIELDS | {"architecture", "d_in"},
    2: _OLD_FIELDS | {"kind", "settings"},
    _SCHEMA: frozenset({"kind", "settings", *_RECORD_FIELDS}),
}


def save_probe(probe: Head, folder: Path | str, record: ProbeRecord) -> None:
    """Write folder/probe.safetensors and folder/probe.json, each atomically."""
    kind, settings, n_classes = _describe(probe)
    check_field(
        Path(folder) / f"{_STEM}.json", "number of class names", len(record.class_names), n_classes
    )
    description = {"kind": kind, "settings": settings, **asdict(record)}
    save_weights(Path(folder), _STEM, probe.state_dict(), description, _SCHEMA)


def load_probe(
    folder: Path | str, expected_model: Mapping[str, str] | None = None
) -> tuple[LinearProbe, ProbeRecord]:
    """Read a linear probe of the embedding, with one label, onto the CPU.

    Anything missing, unexpected, of another model, kind or feature is refused.
    """
    path = Path(folder) / f"{_STEM}.json"
    probe, record = load_head(folder, expected_model)
    check_field(path, "kind", _describe(probe)[0], "linear")
    check_field(path, "feature", record.feature, EMBEDDING)
    check_field(path, "is_multilabel", record.is_multilabel, expected=False)
    assert isinstance(probe, LinearProbe), "its kind says so"
    return probe, record


def load_head(
    folder: Path | str, expected_model: Mapping[str, str] | None = None
) -> tuple[Head, ProbeRecord]:
    """Read a head of any kind onto the CPU; record.feature says what it takes."""
    folder = Path(folder)
    path = folder / f"{_STEM}.json"
    tensors, found = load_weights(folder, _STEM, _SCHEMAS)
    if "architecture" in found:
        check_field(path, "architecture", found["architecture"], "linear")
        check_field(path, "feature", found["feature"], EMBEDDING)
        found = {**found, "kind": "linear", "settings": {"d_in": found["d_in"]}}
    if expected_model is not None:
        check_model(path, found["model"], expected_model)
    found = {"is_multilabel": False, "preprocess": "", **found}
    _check_types(path, found)
    record = ProbeRecord(**{name: found[name] for name in _RECORD_FIELDS})
    _check_sizes(path, found["settings"], tensors)
    what = (path, found["kind"], found["settings"], len(record.class_names))
    # Shapes are compared before there is memory for them: a file may claim any size.
    with torch.device("meta"):
        expected = _build(*what).state_dict()
    check_tensors(path.with_suffix(".safetensors"), tensors, expected)
    if broken := [name for name, one in tensors.items() if not bool(one.isfinite().all())]:
        raise CheckpointError(
            f"{path.with_suffix('.safetensors')}: {', '.join(broken)} holds numbers that are not "
            "finite; train the probe again"
        )
    probe = _build(*what)
    probe.load_state_dict(tensors)
    return probe, record


def _check_types(path: Path, found: Mapping[str, Any]) -> None:
    names = found["class_names"]
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise CheckpointError(f"{path}: class_names is {names!r}, must be a list of texts")
    for name in ("feature", "label_field", "data_fingerprint", "preprocess"):
        if not isinstance(found[name], str):
            raise CheckpointError(f"{path}: {name} is {found[name]!r}, must be a text")
    for name in ("model", "metrics"):
        if not isinstance(found[name], dict):
            raise CheckpointError(f"{path}: {name} is {found[name]!r}, must be a JSON object")
    if not isinstance(found["is_multilabel"], bool):
        raise CheckpointError(f"{path}: is_multilabel must be true or false")


def _check_sizes(path: Path, settings: Any, tensors: Mapping[str, Tensor]) -> None:
    """No size may be larger than all numbers that are there; past 64 bits it is no size at all."""
    n_numbers = sum(one.numel() for one in tensors.values())
    sizes = settings.values() if isinstance(settings, dict) else ()
    if any(type(size) is int and size > n_numbers for size in sizes):
        raise CheckpointError(
            f"{path}: settings are {settings!r}, and its tensors hold {n_numbers} numbers"
        )


def _describe(probe: Head) -> tuple[str, dict[str, int], int]:
    """The kind, its settings, and the number of classes."""
    match probe:
        case MlpProbe():
            hidden, d_in = probe.hidden.weight.shape
            return "mlp", {"d_in": d_in, "hidden": hidden}, len(probe.output.weight)
        case AttentionProbe():
            settings = {"d_in": probe.keys.weight.shape[1], "n_heads": len(probe.query)}
            return "attention", settings, len(probe.output.weight)
        case SparseProbe():
            n_classes, n_latents = probe.weight.shape
            return "sparse", {"n_latents": n_latents}, n_classes
        case LinearProbe():
            n_classes, d_in = probe.weight.shape
            return "linear", {"d_in": d_in}, n_classes


def _build(path: Path, kind: object, settings: Any, n_classes: int) -> Head:
    match kind:
        case "linear":
            (d_in,) = _settings(path, settings, "d_in")
            return LinearProbe(d_in, n_classes)
        case "mlp":
            d_in, hidden = _settings(path, settings, "d_in", "hidden")
            return MlpProbe(d_in, n_classes, hidden=hidden)
        case "attention":
            d_in, n_heads = _settings(path, settings, "d_in", "n_heads")
            try:
                return AttentionProbe(d_in, n_classes, n_heads=n_heads)
            except ConfigError as error:
                raise CheckpointError(f"{path}: {error}") from error
        case "sparse":
            (n_latents,) = _settings(path, settings, "n_latents")
            return SparseProbe(n_latents, n_classes)
        case _:
            raise CheckpointError(
                f"{path}: kind is {kind!r}, expected linear, mlp, attention or sparse"
            )


def _settings(path: Path, settings: Any, *names: str) -> list[int]:
    """The sizes of these names, which must be all there is."""
    if not isinstance(settings, dict) or settings.keys() != set(names):
        raise CheckpointError(f"{path}: settings are {settings!r}, expected {sorted(names)}")
    sizes = [settings[name] for name in names]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(f"{path}: settings {settings!r} must be whole numbers, at least 1")
    return sizes

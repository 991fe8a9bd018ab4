"""A probe on disk: probe.safetensors and probe.json, which says on what it was trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from clipattr.errors import CheckpointError
from clipattr.files import (
    SCHEMA_VERSION,
    check_field,
    check_model,
    check_tensors,
    load_weights,
    save_weights,
)
from clipattr.probes.linear import LinearProbe

_STEM = "probe"
_ARCHITECTURE = "linear"
_FEATURE = "embedding, L2-normalised"


@dataclass(frozen=True)
class ProbeRecord:
    """Where a probe comes from: model {name, weights_sha256}, label field, class names in order."""

    class_names: list[str]
    model: dict[str, str]
    label_field: str
    data_fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a record that does not say on what the probe was made."""
        if set(self.model) != {"name", "weights_sha256"}:
            raise CheckpointError(
                f"ProbeRecord.model has keys {sorted(self.model)}, "
                "expected ['name', 'weights_sha256']"
            )


_RECORD_FIELDS = tuple(each.name for each in fields(ProbeRecord))
_FIELDS = frozenset({"architecture", "feature", "d_in", *_RECORD_FIELDS})


def save_probe(probe: LinearProbe, folder: Path | str, record: ProbeRecord) -> None:
    """Write folder/probe.safetensors and folder/probe.json, each atomically."""
    n_classes, d_in = probe.weight.shape
    check_field(
        Path(folder) / f"{_STEM}.json", "number of class names", len(record.class_names), n_classes
    )
    description = {"architecture": _ARCHITECTURE, "feature": _FEATURE, "d_in": d_in}
    save_weights(Path(folder), _STEM, probe.state_dict(), {**description, **asdict(record)})


def load_probe(
    folder: Path | str, expected_model: Mapping[str, str] | None = None
) -> tuple[LinearProbe, ProbeRecord]:
    """Read a probe onto the CPU; anything missing, unexpected or of another model is refused."""
    folder = Path(folder)
    path = folder / f"{_STEM}.json"
    tensors, found = load_weights(folder, _STEM, {SCHEMA_VERSION: _FIELDS})
    check_field(path, "architecture", found["architecture"], _ARCHITECTURE)
    check_field(path, "feature", found["feature"], _FEATURE)
    if expected_model is not None:
        check_model(path, found["model"], expected_model)
    if not isinstance(found["d_in"], int) or not isinstance(found["class_names"], list):
        raise CheckpointError(f"{path}: d_in must be a whole number and class_names a list")
    record = ProbeRecord(**{name: found[name] for name in _RECORD_FIELDS})
    probe = LinearProbe(found["d_in"], len(record.class_names))
    check_tensors(path.with_suffix(".safetensors"), tensors, probe.state_dict())
    probe.load_state_dict(tensors)
    return probe, record

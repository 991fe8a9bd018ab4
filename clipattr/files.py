"""Weights on disk: <stem>.safetensors beside <stem>.json, written atomically and read strictly.

The JSON carries the sha256 of the weights, so a pair that a killed process left half replaced is
refused instead of being read as one thing. What the fields mean is the business of the caller.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from clipattr.atomic import write_bytes, write_text
from clipattr.errors import CheckpointError

SCHEMA_VERSION = 1
_SHA256 = "tensors_sha256"


def save_weights(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    schema_version: int = SCHEMA_VERSION,
) -> None:
    """Write the pair; each file appears whole or not at all, the JSON last."""
    weights = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )
    record = {
        "schema_version": schema_version,
        **fields,
        _SHA256: hashlib.sha256(weights).hexdigest(),
    }
    try:
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise CheckpointError(
            f"{folder / stem}.json: a field holds nan or infinity, JSON allows finite numbers only"
        ) from error
    write_bytes(folder / f"{stem}.safetensors", weights)
    write_text(folder / f"{stem}.json", text)


def read_sha256(folder: Path, stem: str) -> str:
    """Of the tensors, as the JSON has it: which weights these are, without reading them."""
    path = folder / f"{stem}.json"
    found = _read_object(path).get(_SHA256)
    if not isinstance(found, str):
        raise CheckpointError(f"{path}: has no {_SHA256}")
    return found


def load_weights(
    folder: Path, stem: str, schemas: Mapping[int, frozenset[str]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the fields, which must be exactly those of one of the schemas.

    `schemas` names the fields of every schema version that can be read.
    """
    fields = _read_fields(folder / f"{stem}.json", schemas)
    path = folder / f"{stem}.safetensors"
    weights = _read(path)
    found = hashlib.sha256(weights).hexdigest()
    expected = fields.pop(_SHA256)
    if found != expected:
        raise CheckpointError(
            f"{path}: sha256 is {found}, but {stem}.json was written for {expected}; "
            "the file is damaged or belongs to another save"
        )
    try:
        return safetensors.torch.load(weights), fields
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error


def check_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names and shapes are the expected ones, all floating point."""
    if found.keys() != expected.keys():
        raise CheckpointError(
            f"{path}: missing tensors {sorted(expected.keys() - found.keys())}, "
            f"unexpected tensors {sorted(found.keys() - expected.keys())}"
        )
    for name, tensor in sorted(found.items()):
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"allowed is a floating-point tensor {list(expected[name].shape)}"
            )


def check_field(path: Path, name: str, found: object, expected: object) -> None:
    """Raise CheckpointError, naming both, unless the file says what is expected."""
    if found != expected:
        raise CheckpointError(f"{path}: {name} is {found!r}, expected {expected!r}")


def check_model(path: Path, found: object, expected: Mapping[str, str]) -> None:
    """Raise CheckpointError, naming both, unless the file belongs to the expected CLIP weights.

    The hash decides: one and the same model may be reached by a tag, a hub id or a path.
    """
    found_sha = found.get("weights_sha256") if isinstance(found, Mapping) else None
    if found_sha != expected["weights_sha256"]:
        raise CheckpointError(
            f"{path}: belongs to model {found!r}, expected {dict(expected)!r} (the hash is that of "
            "the weights in the precision in which they are used: model.precision counts)"
        )


def _read_object(path: Path) -> dict[str, Any]:
    content = _read(path)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are no text
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: holds a {type(fields).__name__}, expected a JSON object")
    return fields


def _read_fields(path: Path, schemas: Mapping[int, frozenset[str]]) -> dict[str, Any]:
    fields = _read_object(path)
    version = fields.get("schema_version")
    if not isinstance(version, int) or version not in schemas:
        allowed = " or ".join(str(each) for each in schemas)
        raise CheckpointError(f"{path}: schema_version is {version!r}, expected {allowed}")
    expected = schemas[version] | {_SHA256, "schema_version"}
    if fields.keys() != expected:
        raise CheckpointError(
            f"{path}: missing fields {sorted(expected - fields.keys())}, "
            f"unexpected fields {sorted(fields.keys() - expected)}"
        )
    return fields


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error

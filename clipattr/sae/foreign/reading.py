"""What other toolkits write: tensors, JSON and plain containers, of which nothing can run code."""

import io
import json
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from clipattr.errors import CheckpointError


class Source(NamedTuple):
    """A file with weights, and what the user says of it because no file does."""

    path: Path
    given: dict[str, Any]

    def settings_of(self, name: str) -> dict[str, Any]:
        """The settings in a JSON file beside the weights; what is given goes first."""
        return {**read_json(self.path.with_name(name)), **self.given}

    def require_given(self, needed: Collection[str], example: str) -> None:
        """Raise CheckpointError unless exactly these settings are given."""
        if self.given.keys() != set(needed):
            raise CheckpointError(
                f"{self.path}: does not hold the settings {sorted(needed)}; given are "
                f"{sorted(self.given)}. Say for instance import_sae(path, settings={example})"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist") from None
    except ValueError as error:  # broken JSON, or bytes that are no text
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in float64."""
    try:
        return named_tensors(path, safetensors.torch.load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error


def read_pickle(path: Path, content: bytes | None = None) -> object:
    """Tensors and plain containers that torch.save wrote, and nothing else; `content` of a part."""
    source = path if content is None else io.BytesIO(content)
    try:
        with warnings.catch_warnings():  # of pickles that it does not read
            warnings.filterwarnings("ignore", ".*pickle protocol")
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it calls for {needed[1]})" if needed else ", or is damaged"
        raise CheckpointError(
            f"{path}: holds more than tensors{what}. A pickle can run code, so that nothing but "
            "tensors and plain containers is read. Where you trust it and have the toolkit, save "
            "its tensors alone: torch.save(sae.state_dict(), file); settings go to "
            "import_sae(file, settings=...), or of ViT-Prisma to config.json beside the file "
            "(sae.cfg.save_config)"
        ) from error


def named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """A state dict, in float64: what is folded loses nothing."""
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"{path}: holds no named tensors")
    for name, tensor in content.items():
        if tensor.is_complex() or not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} is complex, or has nan or infinity in it")
    return {str(name): tensor.double() for name, tensor in content.items()}


def require_names(
    path: Path,
    tensors: Mapping[str, Tensor],
    needed: Collection[str],
    optional: Collection[str] = (),
) -> None:
    """Raise CheckpointError for a tensor that lacks, and for one that nothing here reads."""
    missing = set(needed) - tensors.keys()
    unknown = tensors.keys() - set(needed) - set(optional)
    if missing or unknown:
        raise CheckpointError(
            f"{path}: lacks the tensors {sorted(missing)}, and {sorted(unknown)} are not known here"
        )


def expect(path: Path, settings: Mapping[str, Any], **expected: object) -> None:
    """Raise CheckpointError unless the settings, where there are any, have these values."""
    for name, value in expected.items():
        found = settings.get(name, value)
        if found != value:
            raise CheckpointError(f"{path}: {name} is {found!r}; imported can be {value!r} alone")


def whole_number(path: Path, name: str, value: object) -> int:
    """A setting that counts; toolkits write some as floats."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise CheckpointError(f"{path}: {name} is {value!r}, expected a whole number")
    return int(value)

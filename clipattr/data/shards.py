"""WebDataset shards: find them, and read the fields of a sample.

A sample is the members that share a name up to its first dot, as everywhere in WebDataset; fields
are lower case. Members are read by offset and stay bytes: nothing is unpickled or executed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from clipattr.errors import DataError

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
END_MARKER = b"\0" * 1024


class Sample(NamedTuple):
    """Where the fields of one sample lie: field name -> (offset, size) in the shard."""

    key: str
    shard: Path
    fields: dict[str, tuple[int, int]]

    def read(self, name: str) -> bytes:
        """The raw bytes of a field."""
        offset, size = self.fields[name]
        with self.shard.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise DataError(f"{self.shard} ends within {self.key}.{name}: it was cut since")
        return content

    @property
    def image_field(self) -> str | None:
        """The field that holds the image."""
        return next((name for name in IMAGE_FIELDS if name in self.fields), None)


def version_of(shard: Path) -> int:
    """Another number when the shard was replaced: its time."""
    return shard.stat().st_mtime_ns


class BadSample(NamedTuple):
    """A sample that cannot be used, and why."""

    shard: str
    key: str
    reason: str


def find_shards(spec: str, setting: str = "data.shards") -> list[Path]:
    """The .tar files that a file, a folder (sorted) or a brace pattern (as it counts) names."""
    folder = Path(spec)
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            raise DataError(f"{setting}={spec!r}: the folder holds no .tar file")
        return paths
    if "://" in spec or spec.startswith("pipe:"):
        raise DataError(f"{setting}={spec!r}: only local files are read")
    try:
        paths = [Path(name) for name in braceexpand(spec)]
    except ValueError as error:
        raise DataError(f"{setting}={spec!r} is no brace pattern: {error}") from error
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{setting}={spec!r}: {missing[0]} does not exist{more}")
    return paths


def check_bad(bad: list[BadSample], n_seen: int, max_bad_fraction: float) -> None:
    """Raise DataError when more samples are bad than the run allows."""
    if len(bad) > max_bad_fraction * n_seen:
        first = bad[0]
        raise DataError(
            f"{len(bad)} of {n_seen} samples cannot be used; the first is {first.key!r} in "
            f"{first.shard}: {first.reason}. data.max_bad_fraction={max_bad_fraction} allows "
            f"{int(max_bad_fraction * n_seen)}"
        )


def read_text(sample: Sample) -> str:
    """The caption."""
    return sample.read("txt").decode("utf-8")


def read_json(sample: Sample) -> dict[str, object]:
    """The sample's JSON object."""
    try:
        content = json.loads(sample.read("json"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{sample.shard}: {sample.key}.json is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{sample.shard}: {sample.key}.json holds no JSON object")
    return content


def read_label(sample: Sample, label: str, classes: Sequence[str]) -> int:
    """The class in `cls` or in `json:<key>`: its number, or its name."""
    if label == "cls":
        text = sample.read("cls").decode("utf-8", "replace").strip()
    else:
        key = label.removeprefix("json:")
        content = read_json(sample)
        if key not in content:
            raise DataError(f"{sample.shard}: {sample.key}.json has no key {key!r}")
        text = str(content[key])
    if text in classes and not text.isdecimal():
        return classes.index(text)
    text = {"True": "1", "False": "0"}.get(text, text)
    if not text.isdecimal() or int(text) >= len(classes):
        raise DataError(
            f"{sample.shard}: label {label!r} of sample {sample.key!r} is {text!r}; "
            f"allowed are 0 to {len(classes) - 1} and the names of the classes"
        )
    return int(text)

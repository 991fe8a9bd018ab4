"""WebDataset shards: find them, and read the fields of a sample.

A sample is the members that share a name up to its first dot, as everywhere in WebDataset; fields
are lower case. Members are read by offset and stay bytes: nothing is unpickled or executed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from clipattr.data.remote import RemoteShard, Shard, find_remote
from clipattr.data.transfer import TransferError
from clipattr.errors import DataError

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
END_MARKER = b"\0" * 1024


class Sample(NamedTuple):
    """Where the fields of one sample lie: field name -> (offset, size) in the shard."""

    key: str
    shard: Shard
    fields: dict[str, tuple[int, int]]

    def read(self, name: str) -> bytes:
        """The raw bytes of a field."""
        offset, size = self.fields[name]
        if isinstance(self.shard, RemoteShard):
            content = self._fetch(self.shard, name)
        else:
            with self.shard.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        if len(content) < size:
            raise DataError(f"{self.shard} ends within {self.key}.{name}: it was cut since")
        return content

    def _fetch(self, shard: RemoteShard, name: str) -> bytes:
        try:
            return shard.read(*self.fields[name])
        except TransferError as error:
            raise TransferError(f"{shard}: {self.key}.{name}: {error}") from error

    @property
    def image_field(self) -> str | None:
        """The field that holds the image."""
        return next((name for name in IMAGE_FIELDS if name in self.fields), None)


def version_of(shard: Shard) -> int | str:
    """Something else when the shard was replaced: its time, or what its server calls it."""
    return shard.version if isinstance(shard, RemoteShard) else shard.stat().st_mtime_ns


def size_of(shard: Shard) -> int:
    """In bytes."""
    return shard.size if isinstance(shard, RemoteShard) else shard.stat().st_size


class BadSample(NamedTuple):
    """A sample that cannot be used, and why."""

    shard: str
    key: str
    reason: str


def find_shards(
    spec: str,
    setting: str = "data.shards",
    *,
    cache: Path | None = None,
    download_limit: int | None = None,
) -> list[Shard]:
    """The .tar files that a file, a folder (sorted) or a brace pattern (as it counts) names.

    Args:
        spec: of local files, or URLs: http, https, s3, gs and hf.
        setting: where the spec comes from, for messages.
        cache: folder whose `shards/` holds copies of remote shards; None: parts of them are read.
        download_limit: bytes of copies; the shards behind it are read in parts. None: no limit.
    """
    folder = Path(spec)
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            raise DataError(f"{setting}={spec!r}: the folder holds no .tar file")
        return list[Shard](paths)
    if "://" in spec or spec.startswith("pipe:"):
        return list[Shard](find_remote(spec, setting, cache=cache, download_limit=download_limit))
    try:
        paths = [Path(name) for name in braceexpand(spec)]
    except ValueError as error:
        raise DataError(f"{setting}={spec!r} is no brace pattern: {error}") from error
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{setting}={spec!r}: {missing[0]} does not exist{more}")
    return list[Shard](paths)


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
    number = number_of_class(text, classes)
    if number is None:
        raise DataError(
            f"{sample.shard}: label {label!r} of sample {sample.key!r} is {text!r}; "
            f"allowed are 0 to {len(classes) - 1} and the names of the classes"
        )
    return number


def number_of_class(text: str, classes: Sequence[str]) -> int | None:
    """The class that a label names or counts; None where it is none of them."""
    if text in classes and not text.isdecimal():
        return classes.index(text)
    text = {"True": "1", "False": "0"}.get(text, text)
    return int(text) if text.isdecimal() and int(text) < len(classes) else None

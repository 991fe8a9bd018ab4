"""Find WebDataset shards and index their samples from the tar headers; no image is read here.

A sample is the members that share a name up to its first dot, as everywhere in WebDataset; fields
are lower case. Members are read by offset and stay bytes: nothing is unpickled or executed.
"""

import hashlib
import json
import tarfile
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


def index_shards(paths: list[Path]) -> list[Sample]:
    """All samples of the shards, in order; a damaged shard is an error that names it."""
    samples = [sample for path in paths for sample in _index_shard(path)]
    seen: dict[str, Path] = {}
    for sample in samples:
        if sample.key in seen:
            raise DataError(
                f"key {sample.key!r} stands in {seen[sample.key]} and again in {sample.shard}: "
                "keys must be unique over all shards"
            )
        seen[sample.key] = sample.shard
    return samples


def _index_shard(path: Path) -> list[Sample]:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - len(END_MARKER)))
        if file.read() != END_MARKER:
            raise DataError(f"{path} is truncated: its {size} bytes do not end in a tar end marker")
    fields: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    _add_member(path, member, fields)
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a readable tar file: {error}") from error
    _check_end(path, end)
    return [Sample(key, path, found) for key, found in fields.items()]


def _check_end(path: Path, end: int) -> None:
    """Nothing but the end marker may follow the last member that was read.

    tarfile stops without complaint at a cut or at a damaged header, and what follows is lost.
    """
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read()
    if not rest.startswith(END_MARKER) or rest.strip(b"\0"):
        raise DataError(
            f"{path} is damaged: at byte {end} of {end + len(rest)} stands neither a tar header "
            "nor the end marker"
        )


def _add_member(
    path: Path, member: tarfile.TarInfo, fields: dict[str, dict[str, tuple[int, int]]]
) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, dot, field = name.partition(".")
    if not dot or not stem:  # a hidden file, such as the ._000.jpg that macOS adds
        return
    field = field.lower()
    key = f"{folder}/{stem}" if folder else stem
    found = fields.setdefault(key, {})
    if field in found:
        raise DataError(f"{path}: sample {key!r} has the field {field!r} twice")
    found[field] = (member.offset_data, member.size)


def keep_complete(
    samples: list[Sample], needed: tuple[str, ...], max_bad_fraction: float
) -> tuple[list[Sample], list[BadSample]]:
    """The samples that have an image and all needed fields, and a report of the others.

    More than `max_bad_fraction` incomplete samples are an error.
    """
    good: list[Sample] = []
    bad: list[BadSample] = []
    for sample in samples:
        absent = [name for name in needed if name not in sample.fields]
        if sample.image_field is None:
            absent.insert(0, f"image ({', '.join(IMAGE_FIELDS)})")
        if absent:
            reason = f"lacks {', '.join(absent)}; has {', '.join(sorted(sample.fields))}"
            bad.append(BadSample(str(sample.shard), sample.key, reason))
        else:
            good.append(sample)
    check_bad(bad, len(samples), max_bad_fraction)
    if not good:
        raise DataError("the shards hold no sample")
    return good, bad


def check_bad(bad: list[BadSample], n_seen: int, max_bad_fraction: float) -> None:
    """Raise DataError when more samples are bad than the run allows."""
    if len(bad) > max_bad_fraction * n_seen:
        first = bad[0]
        raise DataError(
            f"{len(bad)} of {n_seen} samples cannot be used; the first is {first.key!r} in "
            f"{first.shard}: {first.reason}. data.max_bad_fraction={max_bad_fraction} allows "
            f"{int(max_bad_fraction * n_seen)}"
        )


def fingerprint(samples: list[Sample]) -> str:
    """sha256 over every sample's key, field sizes and shard name."""
    digest = hashlib.sha256()
    for sample in samples:
        sizes = {name: size for name, (_, size) in sorted(sample.fields.items())}
        digest.update(json.dumps([sample.key, sample.shard.name, sizes]).encode())
    return digest.hexdigest()


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

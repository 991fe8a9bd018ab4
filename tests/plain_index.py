"""The index of shards written plainly, on tarfile: the oracle of `clipattr.data.index`."""

import hashlib
import json
import tarfile
from pathlib import Path

from clipattr.data.shards import END_MARKER, IMAGE_FIELDS, BadSample, Sample, check_bad
from clipattr.errors import DataError


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


def fingerprint(samples: list[Sample]) -> str:
    """sha256 over every sample's key, field sizes and shard name."""
    digest = hashlib.sha256()
    for sample in samples:
        sizes = {name: size for name, (_, size) in sorted(sample.fields.items())}
        digest.update(json.dumps([sample.key, sample.shard.name, sizes]).encode())
    return digest.hexdigest()

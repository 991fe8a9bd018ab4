"""One image shard: the tar, and the record that says what it holds."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from webdataset.writer import TarWriter

from clipattr.atomic import atomic_file, write_text
from clipattr.build.pictures import Pictures, store_picture
from clipattr.build.placement import Place
from clipattr.build.sources import Failure, Item, ItemError, Items, Trouble
from clipattr.data.store import read_json


class Record(NamedTuple):
    """What is known of a shard: `fields` and `labels` count the samples that have them.

    A shard all of whose samples are broken has no file.
    """

    file: str
    samples: int
    size: int
    sha256: str
    fields: dict[str, int]
    labels: dict[str, int]
    failures: list[Failure]

    def save(self, path: Path) -> None:
        """Write it as a whole."""
        content = self._asdict() | {"failures": [one.to_json() for one in self.failures]}
        write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """The reverse of `save`."""
        content = read_json(path)
        failures = [Failure.from_json(entry) for entry in content.pop("failures")]
        return cls(**content, failures=failures)


class Job(NamedTuple):
    """One shard to write."""

    folder: Path
    place: Place
    items: Items

    @property
    def tar(self) -> Path:
        """The shard."""
        return self.folder / f"{self.place.stem}.tar"

    @property
    def record(self) -> Path:
        """Where its record is; it is written after the shard."""
        return self.folder / f"{self.place.stem}_stats.json"

    def is_done(self) -> bool:
        """Whether the record is there, and the shard has its size."""
        if not self.record.exists():
            return False
        record = Record.load(self.record)
        if not record.samples:
            return True
        return self.tar.exists() and self.tar.stat().st_size == record.size


def write_shard(job: Job, *, pictures: Pictures) -> Record:
    """Write a shard, and then its record."""
    failures: list[Failure] = []
    samples = _make_samples(job, pictures, failures)
    first = next(samples, None)
    fields: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    size, sha256 = 0, ""
    if first is not None:
        with atomic_file(job.tar) as file:
            _write_tar(file, chain([first], samples), fields, labels)
        size = job.tar.stat().st_size
        with job.tar.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
    n_samples = len(job.items) - len(failures)
    record = Record(job.tar.name, n_samples, size, sha256, dict(fields), dict(labels), failures)
    record.save(job.record)
    return record


def _make_samples(
    job: Job, pictures: Pictures, failures: list[Failure]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and fields of the good items. A broken one leaves a gap in the keys."""
    for position, item in enumerate(job.items):
        try:
            fields = make_fields(item, pictures)
        except ItemError as bad:
            failures.append(bad.failure(item.name))
            continue
        yield job.place.key(position), fields


def make_fields(item: Item, pictures: Pictures) -> dict[str, bytes]:
    """The members of a sample; its image is called what its bytes are, not what its file was."""
    content = item.read()
    field, image = store_picture(content.image, pictures)
    if field in content.fields:
        raise ItemError(Trouble.bad_field, f"the image is a {field}, and there is another {field}")
    return content.fields | {field: image}


def _write_tar(
    file: BinaryIO,
    samples: Iterator[tuple[str, dict[str, bytes]]],
    fields: Counter[str],
    labels: Counter[str],
) -> None:
    with TarWriter(file, encoder=False, mtime=0, user="clipattr", group="clipattr") as writer:
        for key, sample in samples:
            writer.write({"__key__": key} | sample)
            fields.update(sample.keys())
            if "cls" in sample:
                labels[sample["cls"].decode("utf-8", "replace").strip()] += 1

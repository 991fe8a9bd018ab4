"""Picture files of a folder, as samples that the loader of images reads."""

import os
from dataclasses import dataclass
from pathlib import Path

from clipattr.build.source_files import File, inspect_file
from clipattr.build.source_folder import Walk
from clipattr.build.sources import ItemError
from clipattr.data.shards import IMAGE_FIELDS, BadSample, Sample
from clipattr.errors import DataError

# Other names of JPEG files.
_FIELDS = {f".{name}": name for name in IMAGE_FIELDS} | dict.fromkeys((".jpe", ".jfif"), "jpg")


@dataclass(frozen=True)
class Pictures:
    """Picture files as samples, each the only one of its shard; `find_pictures` makes them."""

    root: str
    files: list[File]
    bad: list[BadSample]
    """what has the name of a picture and cannot be read"""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Sample:
        file = self.files[row]
        return Sample(file.name, Path(self.root, file.name), {_field(file.name): (0, file.size)})

    @property
    def n_seen(self) -> int:
        """With the bad ones."""
        return len(self.files) + len(self.bad)


def find_pictures(images: Path | str) -> Pictures:
    """The JPEG, PNG and WEBP files below a folder, sorted, or the one that is named.

    Hidden files and folders are passed over, as is what has no name of a picture; a picture of
    another format is a bad one.
    """
    root = Path(images)
    try:
        if root.is_dir():
            walk = Walk(root)
            files, failures = walk.files, walk.failures
        else:
            root, failures = root.parent, []
            files = [inspect_file(Path(images).name, os.fspath(images))]
    except OSError as error:
        raise DataError(f"images: {error.filename} cannot be read: {error.strerror}") from None
    except ItemError as error:
        raise DataError(f"images={os.fspath(images)!r}: {error.what}") from None
    good = [file for file in files if _field(file.name)]
    bad = [BadSample(str(root / one.name), one.name, one.what) for one in failures]
    bad += [_wrong_format(root, file.name) for file in files if not _field(file.name)]
    if not good:
        also = ""
        if bad:
            also = f" ({len(bad)} cannot be read; the first is {bad[0].key!r}: {bad[0].reason})"
        raise DataError(
            f"images={os.fspath(images)!r}: holds no picture with a name that ends in "
            f"{', '.join(_FIELDS)}{also}"
        )
    return Pictures(os.fspath(root), good, bad)


def _field(name: str) -> str:
    """What the file is called as a field of a sample; empty for what is not read."""
    return _FIELDS.get(os.path.splitext(name)[1].lower(), "")


def _wrong_format(root: Path, name: str) -> BadSample:
    suffix = os.path.splitext(name)[1]
    return BadSample(str(root / name), name, f"{suffix} is read as no picture; convert it to PNG")

"""A folder as a source: each of its sub-folders is a class, as in torchvision's ImageFolder."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clipattr.build.source_files import File, inspect_file, source_of_files
from clipattr.build.sources import Failure, ItemError, Source, Trouble, number_labels
from clipattr.errors import ConfigError, DataError

# What a person takes for an image; the bytes decide whether it is one that can be stored.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
        *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".heif"),
    )
)


class Walk:
    """All image files below a folder, sorted by name.

    Attributes:
        files: their names are relative to the folder.
        failures: images that cannot be looked at.
        ignored: what is no image, by kind.
        folders: the names of the sub-folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = os.path.join(root, "")
        self.files: list[File] = []
        self.failures: list[Failure] = []
        self.ignored: Counter[str] = Counter()
        self.folders: list[str] = []
        self._enter("", ())
        self.files.sort()

    def _enter(self, folder: str, above: tuple[tuple[int, int], ...]) -> None:
        path = self.root + folder
        found = os.stat(path)
        here = (found.st_dev, found.st_ino)
        if here in above:
            raise DataError(f"{path} is a link to a folder that it lies in")
        with os.scandir(path) as entries:
            for entry in entries:
                name = folder + entry.name
                if entry.name.startswith("."):
                    self.ignored["hidden files and folders"] += 1
                elif entry.is_dir():
                    if not folder:
                        self.folders.append(entry.name)
                    self._enter(name + "/", (*above, here))
                else:
                    self._add(name, entry)

    def _add(self, name: str, entry: os.DirEntry[str]) -> None:
        suffix = os.path.splitext(name)[1].lower()
        is_broken_link = entry.is_symlink() and not os.path.exists(entry.path)
        if suffix not in IMAGE_SUFFIXES and not is_broken_link:
            self.ignored[ascii(suffix)[1:-1] or "files without a suffix"] += 1
            return
        try:
            self.files.append(inspect_file(name, entry.path))
        except ItemError as bad:
            self.failures.append(bad.failure(name))


def read_folder(root: Path, classes: Sequence[str] | None = None) -> Source:
    """The images of a folder. Its sub-folders are the classes, as in torchvision's ImageFolder.

    A folder with images of its own and none in sub-folders has no classes.

    Args:
        root: the folder. Links are followed.
        classes: names in the order of the labels; default: the sub-folders, sorted. With names, a
            class may have no image; an image of a folder that is none of them is a failure.
    """
    try:
        walk = Walk(root)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    failures = walk.failures
    inside = [file for file in walk.files if "/" in file.name]
    if not walk.files:
        raise DataError(f"{root} holds no image file ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if not inside:
        if classes is not None:
            raise ConfigError(f"{root} has no class folders, to which {len(classes)} names belong")
        return source_of_files(
            "folder", root, walk.files, failures, ignored=dict(walk.ignored.most_common())
        )
    for file in walk.files:
        if "/" not in file.name:
            what = f"the classes are {', '.join(sorted(walk.folders)[:3])}, ..."
            failures.append(Failure(Trouble.no_class, file.name, what))
    texts = [file.name.partition("/")[0] for file in inside]
    empty = sorted(set(walk.folders) - set(texts))
    if classes is None and empty:
        raise DataError(
            f"{root / empty[0]} holds no image: as a class it would have none, without it the "
            "classes behind it would be numbered anew. Remove it, or name all classes"
        )
    numbered = number_labels(texts, classes, are_names=True)
    failures += [bad.failure(inside[row].name) for row, bad in numbered.bad.items()]
    good = [row for row in range(len(inside)) if row not in numbered.bad]
    return source_of_files(
        "folder",
        root,
        [inside[row] for row in good],
        failures,
        labels=[numbered.numbers[row] for row in good],
        table={"label": [texts[row] for row in good]},
        classes=numbered.classes,
        ignored=dict(walk.ignored.most_common()),
    )

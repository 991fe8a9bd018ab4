"""Folders that say what is to be known: MetaShift's subsets, and class folders with a table."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from clipattr.build.manifest import LABEL, PATH, TABLE_SUFFIXES
from clipattr.build.placement import SPLITS, order_splits
from clipattr.build.recipes.listing import (
    CUE,
    GROUP,
    SPLIT,
    Cells,
    Listing,
    Official,
    Row,
    check_column,
    find_path,
    list_rows,
    mark_cue,
    parse_cells,
    read_official,
)
from clipattr.build.source_folder import Walk
from clipattr.build.sources import Failure, ItemError, Trouble
from clipattr.errors import ConfigError, DataError

SUBSET = re.compile(r"([^()]+)\(([^()]+)\)")


def read_metashift(folder: Path) -> Official:
    """Folders such as cat(sofa)/, with or without train/cat/ above them (Liang and Zou 2022).

    Label: the class; cue: its context. An image (its name is the number in Visual Genome) may be in
    several contexts, but not in two splits.
    """
    walk = _walk(folder)
    split_of: dict[str, str] = {}

    def make(path: str) -> Row:
        words = path.split("/")
        match = SUBSET.fullmatch(words[-2]) if len(words) > 1 else None
        if match is None:
            raise ItemError(Trouble.no_class, "its folder is not named class(context)")
        label, context = (word.strip() for word in match.groups())
        split, image = _split_of(words), Path(path).stem
        if split_of.setdefault(image, split) != split:
            what = f"image {image} is in the split {split_of[image]!r}, too"
            raise ItemError(Trouble.repeated, what)
        return {
            PATH: path,
            LABEL: label,
            SPLIT: split,
            "image": image,
            CUE: context,
            GROUP: f"{label}({context})",
        }

    listing = _list_files(folder, walk, make)
    return Official(listing, folder, None, _splits_of(listing), together="image")


def _walk(folder: Path) -> Walk:
    try:
        walk = Walk(folder)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not walk.files:
        raise DataError(f"{folder} holds no image file")
    return walk


def _list_files(folder: Path, walk: Walk, make: Callable[[str], Row]) -> Listing:
    rows: list[Row] = []
    failures: list[Failure] = list(walk.failures)
    for file in walk.files:
        try:
            rows.append(make(file.name))
        except ItemError as bad:
            failures.append(bad.failure(file.name))
    names = rows[0] if rows else (PATH, LABEL, SPLIT, "image")
    columns = {name: [row[name] for row in rows] for name in names}
    return Listing(folder, columns, [], failures, walk.ignored, [str(row[PATH]) for row in rows])


def _split_of(words: Sequence[str]) -> str:
    """The first folder, if it is named as a split."""
    return words[0] if words[0] in SPLITS and len(words) > 1 else ""


def _splits_of(listing: Listing) -> tuple[str, ...]:
    """Those that occur; none, when nothing names one."""
    found = [str(split) for split in listing.columns[SPLIT]]
    return tuple(order_splits(found)) if any(found) else ()


class Attributes(NamedTuple):
    """How to read a table that goes with a folder of images.

    Attributes:
        table: its file; None: the only one in the folder.
        path: the column that names the images: their path, the name of the file, or that without
            its suffix.
        label: the column of labels; None: the folder of the image.
        cue: the column of the cue.
        split: the column of splits; None: the first folder, if it is named train, val or test.
        together: the column whose values stay in one split when the user splits.
    """

    table: Path | None = None
    path: str = PATH
    label: str | None = None
    cue: str | None = None
    split: str | None = None
    together: str | None = None


def read_image_folder(folder: Path, asked: Attributes) -> Official:
    """Class folders as of torchvision's ImageFolder, and a table of attributes of the images."""
    table = read_official(asked.table or _find_table(folder), asked.path)
    for option in ("label", "cue", "split", "together"):
        check_column(table, getattr(asked, option), f"the column of {option}")
    files = _Files(_walk(folder))
    listing = list_rows([table], partial(_make_row, files=files, asked=asked))
    unlisted = files.unlisted()
    if unlisted:
        listing.ignored["images that the table does not list"] += unlisted
    return Official(listing, folder, None, _splits_of(listing), asked.together)


def _make_row(cells: Cells, *, files: "_Files", asked: Attributes) -> Row:
    path = files.find(cells[asked.path])
    words = path.split("/")
    split = _split_of(words) if asked.split is None else cells[asked.split]
    if asked.label is not None:
        label = cells[asked.label]
    else:
        folders = words[1 if _split_of(words) else 0 : -1]
        if not folders:
            raise ItemError(Trouble.no_class, f"{path} lies in no class folder")
        label = folders[0]
    row = parse_cells(cells)
    if asked.together is not None:
        row[asked.together] = cells[asked.together]
    return mark_cue(row, label, asked.cue) | {PATH: path, LABEL: label, SPLIT: split}


def _find_table(folder: Path) -> Path:
    if not folder.is_dir():
        find_path(folder, "a table")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"{folder} holds {names} as a table: name one with --table")
    return found[0]


class _Files:
    """The images of a folder by path, and by name where that is unique."""

    def __init__(self, walk: Walk) -> None:
        self._paths = {file.name for file in walk.files}
        self._by_name: dict[str, list[str]] = {}
        for path in sorted(self._paths):
            name = path.rpartition("/")[2]
            for key in {name, Path(name).stem}:
                self._by_name.setdefault(key, []).append(path)
        self._listed: Counter[str] = Counter()

    def find(self, name: str) -> str:
        """The path of the image that a table calls so."""
        found = [name] if name in self._paths else self._by_name.get(name, [])
        if not found:
            raise ItemError(Trouble.missing, f"there is no image {name!r}")
        if len(found) > 1:
            raise ItemError(Trouble.malformed, f"{name!r} may be {found[0]} or {found[1]}")
        self._listed[found[0]] += 1
        return found[0]

    def unlisted(self) -> int:
        """Images that `find` has not been asked for."""
        return len(self._paths) - len(self._listed)

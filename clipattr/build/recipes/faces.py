"""CelebA: faces with 40 attributes (Liu et al. 2015).

The download holds img_align_celeba/, list_attr_celeba.txt (the number of images, the names of the
attributes, then a line per image: its file, and 1 or -1 for each) and list_eval_partition.txt (file
and 0 train, 1 val, 2 test); on Kaggle the two lists are CSV files with the columns image_id and
partition, and the images lie one folder deeper. The usual shortcut is that few men are blond.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from clipattr.build.manifest import LABEL, PATH, Table
from clipattr.build.recipes.listing import (
    CUE,
    GROUP,
    SPLIT,
    Cells,
    Images,
    Official,
    Row,
    check_column,
    find_path,
    join_tables,
    list_rows,
    look_up,
    read_official,
)
from clipattr.build.sources import Failure, ItemError, Trouble
from clipattr.errors import DataError

PARTS = {"0": "train", "1": "val", "2": "test"}
IMAGE, PARTITION = "image_id", "partition"
SIGNS = {"1": True, "-1": False}


def read_celeba(folder: Path, label: str = "Blond_Hair", cue: str = "Male") -> Official:
    """Label and cue are attributes; all 40 go into the JSON as true or false."""
    attributes = _read_attributes(folder)
    check_column(attributes, label, "--label-column")
    check_column(attributes, cue, "--cue-column")
    partition = _read_partition(folder)
    images = Images(folder, "img_align_celeba", "Img/img_align_celeba")
    table = join_tables(attributes, IMAGE, partition)
    listing = list_rows([table], partial(_make_row, images=images, label=label, cue=cue))
    return Official(listing, folder, tuple(_name(label)), tuple(PARTS.values()))


def _name(attribute: str) -> list[str]:
    words = attribute.replace("_", " ")
    return [f"not {words}", words]


def _make_row(cells: Cells, *, images: Images, label: str, cue: str) -> Row:
    row: Row = {}
    for name, cell in cells.items():
        if name in (IMAGE, PARTITION):
            continue
        if cell not in SIGNS:
            trouble = Trouble.unknown_label if name == label else Trouble.malformed
            raise ItemError(trouble, f"{name} is {cell!r}; allowed are 1 and -1")
        row[name] = SIGNS[cell]
    names = [_name(name)[SIGNS[cells[name]]] for name in (label, cue)]
    return row | {
        PATH: images.find(Path(cells[IMAGE]).stem),
        LABEL: names[0],
        SPLIT: look_up(cells, PARTITION, PARTS, Trouble.malformed),
        CUE: SIGNS[cells[cue]],
        GROUP: ", ".join(names),
    }


def _read_attributes(folder: Path) -> Table:
    path = find_path(
        folder, "list_attr_celeba.txt", "list_attr_celeba.csv", "Anno/list_attr_celeba.txt"
    )
    if path.suffix == ".csv":
        return read_official(path, IMAGE)
    lines = _read_lines(path)
    table = _split_lines(path, lines[2:], [IMAGE, *lines[1].split()], first=3)
    n_found = len(table.rows) + len(table.failures)
    if lines[0].strip() != str(n_found):
        raise DataError(
            f"{path}: the first line says {lines[0].strip()!r} images, and {n_found} lines follow "
            "the names of the attributes: the file is cut, or none of CelebA"
        )
    return table


def _read_partition(folder: Path) -> Table:
    path = find_path(
        folder,
        "list_eval_partition.txt",
        "list_eval_partition.csv",
        "Eval/list_eval_partition.txt",
    )
    if path.suffix == ".csv":
        return read_official(path, IMAGE, PARTITION)
    return _split_lines(path, _read_lines(path), [IMAGE, PARTITION], first=1)


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(lines) < 3:
        raise DataError(f"{path} has {len(lines)} lines: the file is cut, or none of CelebA")
    return lines


def _split_lines(path: Path, lines: Sequence[str], names: list[str], first: int) -> Table:
    columns: dict[str, list[object]] = {name: [] for name in names}
    rows: list[int] = []
    failures: list[Failure] = []
    for number, line in enumerate(lines, start=first):
        cells = line.split()
        if len(cells) == len(names):
            for name, cell in zip(names, cells, strict=True):
                columns[name].append(cell)
            rows.append(number)
        elif cells:
            what = f"{len(cells)} words, where {len(names)} belong"
            failures.append(Failure(Trouble.malformed, f"{path.name}, row {number}", what))
    return Table(path, columns, rows, failures)

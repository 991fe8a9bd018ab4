"""Writes the atlas: pages, scripts, styles, and the data in files of a hundred latents.

The data are streamed: of a latent that is written, only its row of the table stays in memory.
index.html goes first and comes last, so that a folder without it is not a finished site.
"""

from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from clipattr.atomic import write_bytes, write_text
from clipattr.errors import DataError
from clipattr.report.atlas.content import ClassEntry, ClassLatent, LatentEntry, Overview
from clipattr.report.atlas.scripts import latent_value, rounded, script
from clipattr.report.atlas.table import ClassTable, LatentTable

LATENTS_PER_FILE = 100
CLASSES_PER_FILE = 20

_PAGES = ("latent.html", "class.html", "index.html")  # the index last: it says that all is there
_Item = TypeVar("_Item")


def write_site(
    folder: Path,
    overview: Overview,
    latents: Iterable[LatentEntry],
    classes: Iterable[ClassEntry],
) -> Path:
    """Write the site and return the path of its index.html; the same input gives the same bytes.

    Latents come in order 0, 1, 2, ... without a gap, dead ones included, and so do classes, one
    for each of `overview.class_names`. Thumbnails in `folder`/thumbs are left alone.
    """
    _clear(folder)
    data = folder / "data"
    table, class_table = LatentTable(overview.columns), ClassTable()
    for number, block in enumerate(_blocks(latents, LATENTS_PER_FILE)):
        name = f"latents-{number}"
        values = [_latent(table, entry, len(overview.class_names)) for entry in block]
        write_text(data / f"{name}.js", script(name, values))
    _check_pairs(overview, len(table))
    for number, block in enumerate(_blocks(classes, CLASSES_PER_FILE)):
        name = f"classes-{number}"
        values = [_class(table, class_table, entry) for entry in block]
        write_text(data / f"{name}.js", script(name, values))
    if len(class_table) != len(overview.class_names):
        raise DataError(
            f"The atlas was given {len(class_table)} classes and"
            f" {len(overview.class_names)} names of classes; each class needs both."
        )
    write_text(data / "table.js", script("table", table.value()))
    write_text(data / "overview.js", script("overview", _ranked(overview, table, class_table)))
    write_text(data / "site.js", script("site", _shared(overview, len(table))))
    _write_assets(folder / "assets")
    return _write_pages(folder, overview, len(table))


def _latent(table: LatentTable, entry: LatentEntry, n_classes: int) -> dict[str, object]:
    if entry.latent != len(table):
        raise DataError(
            f"The atlas was given latent {entry.latent} where {len(table)} is next; latents must"
            " come in order and without a gap, dead ones included."
        )
    for each in entry.reliance:
        _check_class(each.class_number, f"Latent {entry.latent}", n_classes)
    return latent_value(entry, table.add(entry))


def _class(table: LatentTable, class_table: ClassTable, entry: ClassEntry) -> dict[str, object]:
    if entry.number != len(class_table):
        raise DataError(
            f"The atlas was given class {entry.number} where {len(class_table)} is next; classes"
            " must come in order and without a gap."
        )
    _check_latents(entry.latents, f"Class {entry.number}", len(table))
    class_table.add(entry)
    return {"pairs": [table.described(pair) for pair in entry.latents], "more": entry.n_more}


def _check_pairs(overview: Overview, n_latents: int) -> None:
    """Every pair of the overview names a latent and a class that have a page."""
    _check_latents((each.pair for each in overview.unexpected), "The ranked list", n_latents)
    for each in overview.unexpected:
        _check_class(each.class_number, "The ranked list", len(overview.class_names))
    for point in overview.points:
        _check_class(point.class_number, "A point", len(overview.class_names))
        _check_latent(point.latent, "A point", n_latents)


def _check_latents(pairs: Iterable[ClassLatent], where: str, n_latents: int) -> None:
    for pair in pairs:
        _check_latent(pair.latent, where, n_latents)
        if pair.counterpart is not None:
            _check_latent(pair.counterpart, where, n_latents)


def _check_latent(latent: int, where: str, n_latents: int) -> None:
    if not 0 <= latent < n_latents:
        raise DataError(
            f"{where} of the atlas names latent {latent}; it has the latents 0 to {n_latents - 1}."
        )


def _check_class(number: int, where: str, n_classes: int) -> None:
    if not 0 <= number < n_classes:
        raise DataError(
            f"{where} of the atlas names class {number}; it has the classes 0 to {n_classes - 1}."
        )


def _ranked(overview: Overview, table: LatentTable, classes: ClassTable) -> dict[str, object]:
    """The ranked list, the points of the scatter and the table of classes."""
    return {
        "unexpected": [
            [each.class_number, *table.described(each.pair)] for each in overview.unexpected
        ],
        "points": [
            [
                point.class_number,
                point.latent,
                rounded(point.alignment),
                rounded(point.mean_attribution),
                int(point.is_unexpected),
            ]
            for point in overview.points
        ],
        "classes": classes.value(),
    }


def _shared(overview: Overview, n_latents: int) -> dict[str, object]:
    """What every page needs."""
    return {
        "title": overview.title,
        "scoreName": overview.score_name,
        "over": overview.over,
        "latents": n_latents,
        "latentsPerFile": LATENTS_PER_FILE,
        "classesPerFile": CLASSES_PER_FILE,
        "classNames": list(overview.class_names),
        "columns": [
            [column.title, column.explanation, int(column.is_latent)] for column in overview.columns
        ],
    }


def _blocks(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def _clear(folder: Path) -> None:
    """Remove a site that stood here, its index first; its pictures stay."""
    (folder / "index.html").unlink(missing_ok=True)
    for path in (folder / "data").glob("*.js"):
        path.unlink()


def _write_assets(folder: Path) -> None:
    """Scripts and styles as they are; the base of the style is that of the report."""
    package = files("clipattr.report")
    write_bytes(folder / "style.css", (package / "templates" / "style.css").read_bytes())
    for source in sorted((package / "atlas" / "assets").iterdir(), key=lambda each: each.name):
        write_bytes(folder / source.name, source.read_bytes())


def _write_pages(folder: Path, overview: Overview, n_latents: int) -> Path:
    """The three pages; returns the path of the index."""
    environment = Environment(
        loader=PackageLoader("clipattr.report.atlas", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in _PAGES:
        page = environment.get_template(name).render(overview=overview, n_latents=n_latents)
        write_text(folder / name, page)
    return folder / "index.html"

"""Waterbirds: birds of CUB-200-2011 on backgrounds of Places (Sagawa et al. 2020, group DRO).

The archive `waterbird_complete95_forest2water2.tar.gz` holds folders of images, one per species,
and metadata.csv: img_id, img_filename, y (1: waterbird), split (0 train, 1 val, 2 test),
place (1: water), place_filename. In train the place goes with the bird in 95 % of the images; in
val and test it does not.
"""

from pathlib import Path

from clipattr.build.manifest import LABEL, PATH
from clipattr.build.recipes.listing import (
    CUE,
    GROUP,
    SPLIT,
    Cells,
    Official,
    Row,
    find_path,
    list_rows,
    look_up,
    parse_cells,
    read_official,
)
from clipattr.build.sources import Trouble

ARCHIVE = "waterbird_complete95_forest2water2"
BIRDS = {"0": "landbird", "1": "waterbird"}
PLACES = {"0": "land", "1": "water"}
PARTS = {"0": "train", "1": "val", "2": "test"}


def read_waterbirds(folder: Path) -> Official:
    """Label: the bird; cue: whether the place is water."""
    table = find_path(folder, "metadata.csv", f"{ARCHIVE}/metadata.csv")
    listing = list_rows(
        [read_official(table, "img_filename", "img_id", "y", "split", "place")], _make_row
    )
    return Official(listing, table.parent, tuple(BIRDS.values()), tuple(PARTS.values()))


def _make_row(cells: Cells) -> Row:
    bird = look_up(cells, "y", BIRDS, Trouble.unknown_label)
    place = look_up(cells, "place", PLACES, Trouble.malformed)
    return parse_cells(cells) | {
        PATH: cells["img_filename"],
        LABEL: bird,
        SPLIT: look_up(cells, "split", PARTS, Trouble.malformed),
        "place": place,
        CUE: place == "water",
        GROUP: f"{bird} on {place}",
    }

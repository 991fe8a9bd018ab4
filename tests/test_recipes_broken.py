"""Recipes: what is wrong with a download is named, by its row."""

import csv
import dataclasses
import re
from pathlib import Path

import pytest

from clipattr.build.build import Options, build_shards, describe
from clipattr.build.recipes import Asked, Attributes, open_recipe
from clipattr.errors import ConfigError, DataError
from clipattr.shards_cli import run_shards
from tests import official_layouts as layouts
from tests.official_layouts import convert, read_all, write_lines, write_pictures


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def change(name: str, row: int, column: str, value: str | None) -> None:
    """Change one cell of a table, by the number that a spreadsheet shows; None: repeat the row."""
    path = Path("download") / name
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if value is None:
        lines.append(lines[row - 1])
    else:
        lines[row - 1][lines[0].index(column)] = value
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


BROKEN = [
    ("waterbirds", "metadata.csv", 3, "img_filename", "x/gone.jpg", "row 3, .*missing file"),
    (
        "waterbirds",
        "metadata.csv",
        4,
        "y",
        "2",
        "row 4: unknown label (y is '2'; allowed are 0, 1)",
    ),
    ("waterbirds", "metadata.csv", 5, "split", "7", "row 5: malformed row (split is '7'"),
    ("waterbirds", "metadata.csv", 6, "place", "", "row 6: malformed row (place is ''"),
    ("waterbirds", "metadata.csv", 7, "y", None, "row 26, .*path twice (metadata.csv, row 7 has"),
    ("waterbirds", "metadata.csv", 3, "img_filename", "../../x.jpg", "row 3, .*outside the folder"),
    ("isic2019", "ISIC_2019_Training_GroundTruth.csv", 2, "MEL", "0.0", "row 2: unknown label (no"),
    ("isic2019", "ISIC_2019_Training_GroundTruth.csv", 2, "NV", "1.0", "row 2: .*MEL and NV is 1"),
    (
        "isic2019",
        "ISIC_2019_Training_GroundTruth.csv",
        2,
        "image",
        "I",
        "row 2: .*'I' has no row in",
    ),
    ("isic2019", "ISIC_2019_Training_Metadata.csv", 2, "image", None, "Metadata.csv, row 98: path"),
    ("isic2020", "ISIC_2020_Training_GroundTruth.csv", 9, "target", "b", "row 9: unknown label"),
    ("isic2020", "ISIC_2020_Training_GroundTruth.csv", 9, "patient_id", "", "row 9.*patient_id is"),
    ("ham10000", "HAM10000_metadata.csv", 11, "dx", "xyz", "row 11: unknown label (dx is 'xyz'"),
    ("ham10000", "HAM10000_metadata.csv", 11, "image_id", "ISIC_9", "row 11: missing file (there"),
    ("chexpert", "valid.csv", 2, "Pneumothorax", "2", "valid.csv, row 2: unknown label"),
    ("chexpert", "train.csv", 2, "Path", "a/b.jpg", "train.csv, row 2: malformed row (Path is"),
]


@pytest.mark.parametrize(("recipe", "table", "row", "column", "value", "message"), BROKEN)
def test_broken_rows_are_named(recipe, table, row, column, value, message, capsys):
    getattr(layouts, recipe)(Path("download"))
    change(table, row, column, value)
    assert convert(recipe) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.search(pattern, shown), shown
    assert "1 of " in shown
    assert convert(recipe, "--max-bad-fraction", "0.2") == 0
    if recipe in ("waterbirds", "chexpert"):  # the others are where they belong, without that one
        assert all(
            one["split"] == split for split, rows in read_all().items() for one in rows.values()
        )


def test_a_build_remembers_the_splits_of_its_source():
    layouts.waterbirds(Path("download"))
    source = open_recipe("waterbirds", Path("download")).source()
    assert source.splits is not None
    build_shards(source, Path("out"))
    swapped = dataclasses.replace(source, splits=[*source.splits[1:], source.splits[0]])
    with pytest.raises(DataError, match="source_splits"):
        build_shards(swapped, Path("out"))
    plans = [describe(one, Options(split={"a": 0.5, "b": 0.5})) for one in (source, swapped)]
    assert plans[0] == plans[1]


def test_empty_split():
    layouts.waterbirds(Path("download"))
    for row in range(2, 26):
        change("metadata.csv", row, "split", str((row // 4) % 2))
    with pytest.raises(DataError, match=r"the split 'test' is empty; there are .*'train': 12"):
        open_recipe("waterbirds", Path("download")).source()


def test_celeba_lists_that_are_cut(capsys):
    layouts.celeba(Path("download"))
    path = Path("download/list_attr_celeba.txt")
    lines = path.read_text().splitlines()
    write_lines(path, *lines[:-1])
    assert convert("celeba") == 2
    assert "the first line says '12' images, and 11 lines follow" in capsys.readouterr().err
    write_lines(path, *lines[:4], "000003.jpg -1 1", *lines[5:])
    assert convert("celeba") == 2
    assert "list_attr_celeba.txt, row 5: malformed row (3 words, where 5" in capsys.readouterr().err
    write_lines(path, *lines[:4], "000003.jpg -1 0 1 1", *lines[5:])
    assert convert("celeba") == 2
    shown = capsys.readouterr().err
    assert "row 5: unknown label (Blond_Hair is '0'; allowed are 1 and -1)" in shown


def test_image_folder_names_what_it_cannot_match(capsys):
    write_pictures(Path("download"), ["a/1.jpg", "b/1.jpg", "stray.jpg"])
    write_lines(
        Path("download/t.csv"), "path,v", "1,0", "a/1.jpg,1", "stray,2", "gone,3", "b/1.jpg,4"
    )
    assert convert("imagefolder") == 2
    shown = capsys.readouterr().err
    assert "3 of 5 cannot be used" in shown
    assert "t.csv, row 2: malformed row ('1' may be a/1.jpg or b/1.jpg)" in shown
    assert "t.csv, row 4: in no class folder (stray.jpg lies in no class folder)" in shown
    assert "t.csv, row 5: missing file (there is no image 'gone')" in shown


def test_metashift_refuses_leaks(capsys):
    write_pictures(Path("download"), ["train/cat/cat(sofa)/7.jpg", "test/cat/cat(bed)/7.jpg"])
    write_pictures(Path("download"), ["train/dog/dog(bed)/8.jpg", "train/dog/9.jpg"])
    assert convert("metashift", "--max-bad-fraction", "0") == 2
    shown = capsys.readouterr().err
    assert "train/cat/cat(sofa)/7.jpg: path twice (image 7 is in the split 'test', too)" in shown
    assert "train/dog/9.jpg: in no class folder (its folder is not named class(context))" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["waterbirds", "download", "out"], "download holds no metadata.csv and no waterbird_c"),
        (["waterbirds", "nowhere", "out"], "nowhere is no folder"),
        (["imagefolder", "download", "out"], "download holds none as a table: name one with"),
        (["chexpert", "download", "out", "--uncertain", "x"], "--uncertain x: allowed are zeros"),
        (["chexpert", "download", "out", "--view", "x"], "--view x: allowed are frontal"),
        (["metashift", "download", "out"], "download holds no image file"),
    ],
)
def test_mistakes_give_one_message(arguments: list[str], message: str, capsys):
    Path("download").mkdir()
    Path("download/notes.txt").write_text("")
    assert run_shards(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert not Path("out").exists()


def test_columns_that_are_not_there():
    layouts.waterbirds(Path("birds"))
    text = Path("birds/metadata.csv").read_text().replace("place,", "spot,", 1)
    Path("birds/metadata.csv").write_text(text)
    with pytest.raises(DataError, match="has no column 'place'; it has img_id, img_filename, y"):
        open_recipe("waterbirds", Path("birds"))
    layouts.celeba(Path("faces"))
    with pytest.raises(
        DataError, match="--cue-column Hat: .*no such column; it has image_id, Bald"
    ):
        open_recipe("celeba", Path("faces"), Asked(cue="Hat"))
    write_pictures(Path("photos"), ["a/1.jpg"])
    write_lines(Path("photos/t.csv"), "file", "a/1.jpg")
    with pytest.raises(ConfigError, match="no column 'path'"):
        open_recipe("imagefolder", Path("photos"))
    with pytest.raises(DataError, match="the column of split part"):
        open_recipe(
            "imagefolder", Path("photos"), Asked(attributes=Attributes(None, "file", split="part"))
        )

"""Recipes: miniature official downloads become shards, and our index reads them back."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from clipattr.shards_cli import RECIPES, make_recipe_parser, run_shards
from tests import official_layouts as layouts
from tests.official_layouts import (
    Samples,
    convert,
    read_all,
    read_back,
    splits,
    write_lines,
    write_pictures,
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("inner", ["", "waterbird_complete95_forest2water2"])
def test_waterbirds(inner: str, capsys):
    rows = layouts.waterbirds(Path("download") / inner)
    assert convert("waterbirds") == 0
    assert re.findall(r"(\w+): (\d+) samples", capsys.readouterr().out) == [
        ("train", "8"),
        ("val", "8"),
        ("test", "8"),
    ]
    if inner:
        Path("download", inner).rename("inner")
        Path("download").rmdir()
        Path("inner").rename("download")
    found = read_all()
    for path, y, split, place in rows:
        one = found[["train", "val", "test"][split]][path]
        assert one["class"] == one["label"] == ["landbird", "waterbird"][y]
        assert one["cue"] is [False, True][place]
        assert one["group"] == f"{one['label']} on {['land', 'water'][place]}"
        assert one["place"] == ["land", "water"][place]
    assert sum(map(len, found.values())) == len(rows)


@pytest.mark.parametrize("is_kaggle", [False, True])
def test_celeba(is_kaggle: bool):
    rows = layouts.celeba(Path("download"), is_kaggle=is_kaggle)
    assert convert("celeba") == 0
    found = {
        part: {Path(path).name: one for path, one in rows.items()}
        for part, rows in read_all().items()
    }
    for file, blond, male, split in rows:
        one = found[["train", "val", "test"][split]][file]
        assert one["class"] == ["not Blond Hair", "Blond Hair"][blond]
        assert (one["Blond_Hair"], one["Male"], one["Bald"]) == (bool(blond), bool(male), False)
        assert one["cue"] is bool(male)
        assert one["group"] == f"{one['class']}, {['not Male', 'Male'][male]}"


def test_celeba_with_another_label_and_cue():
    layouts.celeba(Path("download"))
    assert convert("celeba", "--label-column", "Male", "--cue-column", "Blond_Hair") == 0
    for one in read_back("test").values():
        assert one["class"] == ("Male" if one["Male"] else "not Male")
        assert one["cue"] == one["Blond_Hair"]


def test_isic2019_keeps_lesions_together():
    rows = layouts.isic2019(Path("download"))
    assert convert("isic2019", "--cue-column", "sex") == 0
    found = read_all()
    by_name = {Path(path).stem: one for part in found.values() for path, one in part.items()}
    full = {"MEL": "melanoma", "NV": "melanocytic nevus", "SCC": "squamous cell carcinoma"}
    for number, (image, code, lesion) in enumerate(rows):
        one = by_name[image]
        assert full.get(code, one["class"]) == one["class"]
        assert one["lesion_id"] == (lesion or None)
        sex = layouts.SEXES[number % 3]
        assert one["cue"] == (sex or None)
        assert one["group"] == f"{one['class']}, sex={sex or 'unknown'}"
        assert one["age_approx"] == (55.0 if number % 3 else None)
    assert len({one["class"] for one in by_name.values()}) == 8
    check_apart(found, "lesion_id")


def check_apart(found: dict[str, Samples], column: str) -> None:
    """No value of a column is in two splits, and there are several splits."""
    values = [{one[column] for one in part.values()} - {None} for part in found.values()]
    assert len(found) == 3
    assert all(values)
    assert sum(map(len, values)) == len(set.union(*values))


@pytest.mark.parametrize("is_kaggle", [False, True])
def test_isic2020_keeps_patients_together(is_kaggle: bool, capsys):
    rows = layouts.isic2020(Path("download"), is_kaggle=is_kaggle)
    pairs = Path("download/ISIC_2020_Training_Duplicates.csv")
    write_lines(pairs, "image_name_1,image_name_2", "ISIC_0000000,ISIC_0000004")
    parts = "train=0.4,val=0.3,test=0.3"
    assert convert("isic2020", "--split", parts) == 0
    assert "ignored: 1 x copies that ISIC lists" in capsys.readouterr().out
    found = read_all()
    by_name = {Path(path).stem: one for part in found.values() for path, one in part.items()}
    assert by_name.keys() == {row[0] for row in rows} - {"ISIC_0000004"}
    for image, patient, target in rows:
        if image in by_name:
            one = by_name[image]
            assert (one["patient_id"], one["target"]) == (patient, target)
            assert one["class"] == ["benign", "malignant"][target]
            assert "cue" not in one
    check_apart(found, "patient_id")


def test_ham10000_keeps_lesions_together():
    rows = layouts.ham10000(Path("download"))
    assert convert("ham10000") == 0
    found = read_all()
    by_name = {Path(path).stem: one for part in found.values() for path, one in part.items()}
    classes = {"nv": "melanocytic nevus", "mel": "melanoma", "df": "dermatofibroma"}
    assert by_name.keys() == {row[0] for row in rows}
    for image, dx, lesion in rows:
        one = by_name[image]
        assert (one["dx"], one["lesion_id"]) == (dx, lesion)
        assert one["class"] == classes.get(dx, one["class"])
        assert one["age"] == (None if dx == "df" else 80.0)
    check_apart(found, "lesion_id")


@pytest.mark.parametrize(
    ("uncertain", "positive"), [("zeros", {"1.0"}), ("ones", {"1.0", "-1.0"}), ("ignore", {"1.0"})]
)
def test_chexpert_policies(uncertain: str, positive: set[str], capsys):
    rows = layouts.chexpert(Path("download"))
    assert convert("chexpert", "--uncertain", uncertain) == 0
    shown = capsys.readouterr().out
    found = read_all()
    assert found.keys() == {"train", "val"}
    kept = {path: one for part in found.values() for path, one in part.items()}
    is_ignored = 0
    for path, view, finding, device in rows:
        if view == "Lateral" or (uncertain == "ignore" and finding == "-1.0"):
            assert path not in kept
            is_ignored += view == "Frontal"
            continue
        one = kept.pop(path)
        assert one["class"] == ("Pneumothorax" if finding in positive else "no Pneumothorax")
        assert one["cue"] is (device == "1.0")
        assert one["Pneumothorax"] == (float(finding) if finding else None)
        assert one["split"] == {"train": "train", "valid": "val"}[path.split("/")[0]]
        assert one["patient"] == path.split("/")[1]
    assert not kept
    assert f"ignored: {sum(row[1] == 'Lateral' for row in rows)} x lateral views" in shown
    assert is_ignored == (4 if uncertain == "ignore" else 0)


def test_chexpert_views_and_own_splits():
    layouts.chexpert(Path("download"))
    options = ["--view", "lateral", "--split", "train=0.5,test=0.5", "--uncertain", "zeros"]
    assert convert("chexpert", *options) == 0
    assert splits() == ["test", "train"]
    views = {one["Frontal/Lateral"] for part in read_all().values() for one in part.values()}
    assert views == {"Lateral"}


@pytest.mark.parametrize("has_splits", [False, True])
def test_metashift(has_splits: bool):
    names = layouts.metashift(Path("download"), has_splits=has_splits)
    options = [] if has_splits else ["--split", "train=0.5,test=0.5"]
    assert convert("metashift", *options) == 0
    found = read_all()
    assert splits() == ["test", "train"]
    paths = {path: one for part in found.values() for path, one in part.items()}
    assert paths.keys() == set(names)
    for path, one in paths.items():
        label, context = re.fullmatch(r"(\w+)\((\w+)\)", path.split("/")[-2]).groups()
        assert (one["class"], one["cue"]) == (label, context)
        assert one["group"] == f"{label}({context})"
    images = [{one["image"] for one in part.values()} for part in found.values()]
    assert not images[0] & images[1]
    if has_splits:
        assert all(path.startswith(f"{split}/") for split in found for path in found[split])


def test_image_folder_with_a_table():
    names = [f"{label}/{label}{n}.png" for label in ("10", "9") for n in range(4)]
    write_pictures(Path("download"), names)
    keys = [names[0], "101.png", "102", "103", *names[4:7]]
    lines = [
        f"{key},{n % 2},{['a', 'b', ''][n % 3]},00{n // 2},{'train' if n < 4 else 'test'}"
        for n, key in enumerate(keys)
    ]
    write_lines(Path("download/attributes.csv"), "image,hat,site,owner,part", *lines)
    options = ["--path-column", "image", "--cue-column", "hat", "--split-column", "part"]
    assert convert("imagefolder", *options) == 0
    found = read_all()
    assert {split: list(rows) for split, rows in found.items()}.keys() == {"train", "test"}
    for n, name in enumerate(names[:7]):
        one = found["train" if n < 4 else "test"][name]
        assert one["class"] == one["label"] == name.split("/")[0]
        assert (one["hat"], one["cue"]) == (n % 2, n % 2)
        assert one["site"] == ["a", "b", None][n % 3]
        assert one["owner"] == f"00{n // 2}"
    assert json.loads(Path("out/report.json").read_text())["ignored"] == {
        "images that the table does not list": 1,
    }


def test_image_folder_with_split_folders_and_label_column():
    names = [f"{split}/x/{split}{n}.jpg" for split in ("train", "val") for n in range(3)]
    write_pictures(Path("download"), names)
    lines = [f"{name};{'cat' if n % 2 else 'dog'}" for n, name in enumerate(names)]
    write_lines(Path("table.csv"), "path;animal", *lines)
    assert convert("imagefolder", "--table", "table.csv", "--label-column", "animal") == 0
    found = read_all()
    for n, name in enumerate(names):
        assert found[name.split("/")[0]][name]["class"] == ("cat" if n % 2 else "dog")


def test_a_table_of_ones_own_with_a_column_of_splits(capsys):
    """The plain command, too: the order of the splits is not that of the rows."""
    write_pictures(Path("download"), ["a.jpg", "b.jpg", "c.jpg"])
    write_lines(Path("t.csv"), "path,label,part", "a.jpg,0,test", "b.jpg,1,extra", "c.jpg,1,train")
    plain = ["t.csv", "out", "--root", "download", "--split-column", "part"]
    assert run_shards(plain) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"(\w+): 1 samples", shown) == ["train", "test", "extra"]
    assert run_shards([*plain, "--split", "x=0.5,y=0.5"]) == 2
    assert "--split-column names splits, and --split makes them" in capsys.readouterr().err
    write_lines(Path("t.csv"), "path,label,part", "a.jpg,0,test", "b.jpg,1,extra", "c.jpg,1,test")
    assert run_shards(plain) == 2
    assert "out" in capsys.readouterr().err  # begun with other splits


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_each_recipe(recipe: str, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_shards([recipe, "--help"])
    shown = capsys.readouterr().out
    assert RECIPES[recipe] in shown
    assert all(action.help for action in make_recipe_parser(recipe)._actions)
    counts = Counter(re.findall(r"--[a-z-]+-column", shown))
    assert ("--cue-column" in counts) == (recipe not in ("waterbirds", "metashift"))

"""Every recipe from its miniature official download to a table of amplification and a page."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from clipattr.config.schema import EVALUATE_JOBS, TRAIN_JOBS
from clipattr.main import run_script
from clipattr.shards_cli import RECIPES
from tests import official_layouts as layouts
from tests.official_layouts import convert, write_lines, write_pictures

CONFIGS = Path(__file__).parents[1] / "configs" / "recipes"
# The bundled CLIP instead of weights to download, and few images.
SMALL = ("model.name=planted-world", "model.pretrained=null", "trainer.accelerator=cpu")
SMALL += ("trainer.progress=false", "data.workers=0")
SPLITS = ("--split", "train=0.5,val=0.25,test=0.25")


class Chain(NamedTuple):
    """The download, the options of the converter, and how many cues the recipe suspects."""

    download: Callable[[Path], object]
    options: tuple[str, ...]
    metadata: str
    pasted: str


def image_folder(folder: Path) -> None:
    names = [f"{label}/{n}.jpg" for label in ("cat", "dog") for n in range(40)]
    write_pictures(folder, names)
    lines = [f"{name},{number % 2}" for number, name in enumerate(names)]
    write_lines(folder / "cues.csv", "path,cue", *lines)


CHAINS = {
    "waterbirds": Chain(lambda at: layouts.waterbirds(at, 120), (), "water", "sticker"),
    "celeba": Chain(lambda at: layouts.celeba(at, 120), (), "male", "sticker"),
    "isic2019": Chain(
        lambda at: layouts.isic2019(at, 256), ("--cue-column", "sex", *SPLITS), "female", "ruler"
    ),
    "isic2020": Chain(
        lambda at: layouts.isic2020(at, 160), ("--cue-column", "sex", *SPLITS), "female", "ink"
    ),
    "ham10000": Chain(
        lambda at: layouts.ham10000(at, 224), ("--cue-column", "sex", *SPLITS), "female", "ruler"
    ),
    "chexpert": Chain(
        lambda at: layouts.chexpert(at, 240), ("--uncertain", "zeros", *SPLITS), "devices", "label"
    ),
    "metashift": Chain(
        lambda at: layouts.metashift(at, has_splits=False, more=20), SPLITS, "sofa", "watermark"
    ),
    "imagefolder": Chain(
        image_folder,
        ("--table", "download/cues.csv", "--cue-column", "cue", *SPLITS),
        "cue",
        "sticker",
    ),
}


def test_every_recipe_has_a_chain_and_its_two_configs():
    assert CHAINS.keys() == set(RECIPES) == {path.name for path in CONFIGS.iterdir()}
    for path in CONFIGS.iterdir():
        assert {one.name for one in path.iterdir()} == {"probe.yaml", "shortcuts.yaml"}


@pytest.mark.parametrize("recipe", CHAINS)
def test_from_the_download_to_the_page(recipe: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = CHAINS[recipe]
    chain.download(Path("download"))
    assert convert(recipe, *chain.options) == 0
    Path("shards").mkdir()
    Path("out").rename(f"shards/{recipe}")
    probe, shortcuts = (str(CONFIGS / recipe / f"{name}.yaml") for name in ("probe", "shortcuts"))
    assert run_script("train.py", TRAIN_JOBS, [probe, *SMALL]) == 0
    few = ("pairs.images=16", "shortcuts.resamples=50", "shortcuts.shown=2")
    assert run_script("evaluate.py", EVALUATE_JOBS, [shortcuts, *SMALL, *few]) == 0
    run = Path("runs") / recipe / "shortcuts"
    check_table(run, chain)
    check_page((run / "report" / "index.html").read_text(), chain)


def check_table(run: Path, chain: Chain) -> None:
    """Both heads' effects of the pasted cue and of its placebo, and accuracies of the groups."""
    with (run / "effects.csv").open() as file:
        effects = [row for row in csv.DictReader(file) if row["cue"] == chain.pasted]
    assert {row["is_placebo"] for row in effects} == {"False", "True"}
    for row in effects:
        for head in ("text", "probe"):
            low, mean, high = (float(row[f"{head}_{part}"]) for part in ("low", "mean", "high"))
            assert low < mean < high
    with (run / "groups.csv").open() as file:
        groups = [row for row in csv.DictReader(file) if row["cue"] == chain.metadata]
    check_groups(groups)
    # What is pasted is in no column: its pairs are its groups, and repairs are learned from others.
    with (run / "groups.csv").open() as file:
        groups = [row for row in csv.DictReader(file) if row["cue"] == chain.pasted]
    check_groups(groups)
    sides = [
        sum(
            int(row["images"]) for row in groups if row["has_cue"] == side and row["head"] == "text"
        )
        for side in ("False", "True")
    ]
    assert sides[0] == sides[1] <= 16
    with (run / "repairs.csv").open() as file:
        repairs = [row for row in csv.DictReader(file) if row["cue"] == chain.pasted]
    assert [row["name"] for row in repairs][:2] == ["text", "probe"]
    assert "project" in [row["name"] for row in repairs]
    assert (run / "repaired" / chain.pasted / "project" / "probe.safetensors").is_file()


def check_groups(groups: list[dict[str, str]]) -> None:
    assert {(row["has_cue"], row["head"]) for row in groups} == {
        (has_cue, head) for has_cue in ("False", "True") for head in ("text", "probe")
    }
    assert sum(int(row["images"]) for row in groups) > 0


def check_page(page: str, chain: Chain) -> None:
    """Groups and pairs as pictures, each with words for those who do not see it."""
    described = re.findall(r"<img src=\"data:image/png;base64,[^\"]{100,}\" alt=\"([^\"]+)\"", page)
    assert sum(chain.metadata in words for words in described) >= 2
    assert sum(chain.pasted in words for words in described) >= 2
    assert any(f"with the cue {chain.pasted}, 1 of" in words for words in described)

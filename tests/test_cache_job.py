"""The job that caches several sites: rows as the model has them, once, found by training."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipattr.clip import Site, image_tower, load_clip
from clipattr.clip.images import OpenClipImages
from clipattr.config.schema import TRAIN_JOBS
from clipattr.data import ActivationStore, build_index, image_loader
from clipattr.data.chunks import Layout
from clipattr.data.pixels import Pixels
from clipattr.data.shards import find_shards
from clipattr.main import run_script
from clipattr.world import shards as world_shards
from clipattr.world.sampling import Split
from tests.tiny import save_tiny_clip

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "train" / "cache.yaml")
SAE = str(ROOT / "configs" / "demo" / "sae.yaml")
N_IMAGES, N_PATCHES = 40, 16
SITES = {
    "residual-1-cls": "{layer: -1}",
    "residual-0-spatial": "{layer: 0, tokens: spatial}",
    "residual-0-spatial-3": "{layer: 0, tokens: spatial, tokens_per_image: 3}",
    "neurons-1-all": "{layer: 1, stream: neurons, tokens: all}",
    "heads-0-cls": "{layer: 0, stream: heads}",
    "embedding-1-cls": "{stream: embedding}",
}
ALL = f"sites=[{', '.join(SITES.values())}]"


class Setup:
    """Two shards, a model, and the command lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_tiny_clip(folder / "tiny")
        self.shards = folder / "shards"
        self.shards.mkdir()
        half = N_IMAGES // 2
        for number, bounds in enumerate([(0, half), (half, N_IMAGES)]):
            path = self.shards / f"{number:06d}.tar"
            world_shards._write_shard(path, bounds, split=Split.val, seed=0)

    def arguments(self, config: str, runs: Path, *overrides: str) -> list[str]:
        common = [f"model.name={self.model}", f"data.shards={self.shards}", "data.workers=0"]
        common += [f"data.cache={runs / 'cache'}", f"runs={runs}", "data.batch_size=16"]
        return [config, *common, "trainer.accelerator=cpu", "trainer.progress=false", *overrides]

    def cache(self, runs: Path, *overrides: str) -> int:
        return run_script("train.py", TRAIN_JOBS, self.arguments(CONFIG, runs, *overrides))

    def train_sae(self, runs: Path, *overrides: str) -> int:
        small = ["sae.n_latents=48", "sae.k=6", "sae.batch_size=32", "trainer.steps=5"]
        small += [f"held_out={self.shards}", *overrides]
        return run_script("train.py", TRAIN_JOBS, self.arguments(SAE, runs, *small))


def folders_of(runs: Path) -> dict[str, Path]:
    places = json.loads((runs / "cache" / "world" / "stores.json").read_text())
    return {name: Path(entry["folder"]) for name, entry in places.items()}


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    return Setup(tmp_path_factory.mktemp("setup"))


@pytest.fixture(scope="module")
def runs(setup, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert setup.cache(runs, ALL) == 0
    return runs


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The sizes of the batches that go through the blocks of the tower."""
    sizes: list[int] = []
    contexts = OpenClipImages.contexts

    def count(self: OpenClipImages, inputs: Tensor | None) -> list:
        sizes.append(0 if inputs is None else len(inputs))
        return contexts(self, inputs)

    monkeypatch.setattr(OpenClipImages, "contexts", count)
    return sizes


@pytest.mark.parametrize("with_heads", [False, True])
def test_rows_are_those_of_every_site_alone(setup, tmp_path, with_heads):
    """Bit for bit what `cut.read` gives; heads are computed apart, so to rounding behind them."""
    chosen = [site for name, site in SITES.items() if with_heads or name != "heads-0-cls"]
    assert setup.cache(tmp_path, f"sites=[{', '.join(chosen)}]") == 0
    clip = load_clip(setup.model)
    tower, pixels = image_tower(clip.model), Pixels(clip.preprocess)
    index = build_index(find_shards(str(setup.shards)), cache=None)
    for name, folder in folders_of(tmp_path).items():
        stream, layer, tokens, *drawn = name.split("-")
        store = ActivationStore.open(folder)
        cut = tower.cut(Site(int(layer), stream, tokens))
        n_tokens = {"cls": 1, "spatial": N_PATCHES, "all": N_PATCHES + 1}[tokens]
        assert store.tokens == (int(drawn[0]) if drawn else n_tokens)
        assert store.n_rows == N_IMAGES * store.tokens
        found = store.read(store.rows_by_image()).reshape(N_IMAGES, store.tokens, -1)
        kept = store.read(store.rows_by_image(), "tokens").long().reshape(N_IMAGES, -1)
        images = read_order(store)
        loader = image_loader(index.select(images.numpy()), pixels, batch_size=16, workers=0)
        for batch in loader:
            with torch.no_grad():
                x = cut.read(pixels.normalise(batch.images))
            owners = images[batch.rows]
            x = x.reshape(len(owners), n_tokens, -1)
            expected = x.take_along_dim(kept[owners][:, :, None], dim=1)
            tolerance = 1e-5 if with_heads else 0
            torch.testing.assert_close(found[owners], expected, rtol=0, atol=tolerance)


def read_order(store: ActivationStore) -> Tensor:
    """The order in which `write_stores` asks for the images of a store of one file."""
    plan = json.loads((store.folder / "plan.json").read_text())
    assert plan["n_chunks"] == 1
    layout = Layout(plan["n_images"], 1, plan["order"], plan["seed"], plan["block_rows"])
    return torch.from_numpy(layout.images())


def test_one_pass_for_all_and_none_for_what_is_there(setup, tmp_path, passes, caplog):
    caplog.set_level("INFO")
    assert setup.cache(tmp_path, f"sites=[{SITES['neurons-1-all']}]") == 0
    assert sum(passes) == N_IMAGES
    assert setup.cache(tmp_path, ALL) == 0
    assert sum(passes) == 2 * N_IMAGES
    assert "40 images encoded" in caplog.text
    assert "neurons-1-all: 680 rows, 0.4 MB in" in caplog.text
    assert setup.cache(tmp_path, ALL) == 0
    assert "is finished" in caplog.text
    assert setup.cache(tmp_path, ALL, "name=other") == 0
    assert "0 images encoded" in caplog.text
    assert sum(passes) == 2 * N_IMAGES


def test_a_deleted_cache_is_written_again(setup, tmp_path, passes):
    sites = f"sites=[{SITES['residual-1-cls']}, {SITES['residual-0-spatial-3']}]"
    assert setup.cache(tmp_path, sites) == 0
    folder = folders_of(tmp_path)["residual-0-spatial-3"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    assert setup.cache(tmp_path, sites) == 0
    assert sum(passes) == 2 * N_IMAGES
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_run_folder_says_what_is_where(runs):
    run = runs / "cache" / "world"
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["images"], metrics["bad"]) == (N_IMAGES, 0)
    assert metrics["cache"].keys() == SITES.keys()
    assert metrics["cache"]["residual-0-spatial-3"]["rows"] == 3 * N_IMAGES
    assert metrics["cache"]["neurons-1-all"]["bytes"] > 4 * 128 * 17 * N_IMAGES
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["data"].keys() == SITES.keys()
    assert len(set(manifest["data"].values())) == len(SITES)


@pytest.mark.parametrize("name", SITES)
def test_training_finds_the_cache(setup, runs, passes, name):
    words = SITES[name].strip("{}").split(", ")
    settings = [f"site.{key}={value}" for key, value in (word.split(": ") for word in words)]
    assert setup.train_sae(runs, f"name=sae/{name}", *settings) == 0
    assert sum(passes) == 0
    run = runs / "sae" / name
    stream, layer, tokens, *_ = name.split("-")
    record = json.loads((run / "sae.json").read_text())
    assert record["site"] == {"layer": int(layer), "stream": stream, "tokens": tokens}
    manifest = json.loads((runs / "cache" / "world" / "manifest.json").read_text())
    assert record["data_fingerprint"] == manifest["data"][name]
    assert record["metrics"]["n_rows"] == ActivationStore.open(folders_of(runs)[name]).n_rows


def test_two_processes_write_together(setup, runs, tmp_path):
    command = [sys.executable, "train.py"]
    command += setup.arguments(CONFIG, tmp_path, ALL, "trainer.devices=2")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("40 images encoded") == 1
    for name, folder in folders_of(tmp_path).items():
        store, alone = ActivationStore.open(folder), ActivationStore.open(folders_of(runs)[name])
        store.verify()
        assert store.index_hash == alone.index_hash
        torch.testing.assert_close(store.load(), alone.load())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sites=[]"], "sites=[]: name at least one"),
        (["sites=[{layer: 9}]"], "sites[0]: site.layer=9: the tower has 2 layers"),
        (["sites=[{tokens_per_image: 2}]"], "sites[0].tokens_per_image=2: sites[0].tokens=cls"),
        (["sites=[{layer: 1}, {layer: -1}]"], "sites[1]: residual-1-cls is named twice"),
        (
            ["sites=[{tokens: all, tokens_per_image: 18}]"],
            "site.tokens_per_image=18: the tower has 17 tokens (all) per image",
        ),
        (["sites=[{tokens: patches}]"], "sites[0].tokens='patches'"),
        (["sites=[3]"], "sites[0]=3 on the command line: must be a section with keys layer"),
        (["sites={layer: 3}"], "must be a list of sections with keys layer, stream, tokens"),
    ],
)
def test_wrong_settings_say_what_is_wrong(setup, tmp_path, capsys, overrides, expected):
    assert setup.cache(tmp_path, *overrides) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_one_site_of_training_is_checked_too(setup, tmp_path, capsys):
    for settings, expected in (
        (["site.tokens_per_image=1"], "site.tokens_per_image=1: site.tokens=cls is one token"),
        (
            ["site.tokens=spatial", "site.tokens_per_image=17"],
            "site.tokens_per_image=17: the tower has 16 tokens (spatial) per image",
        ),
        (["site.tokens=all", "site.tokens_per_image=0"], "must be greater than 0"),
    ):
        assert setup.train_sae(tmp_path, *settings) == 2
        assert expected in capsys.readouterr().err

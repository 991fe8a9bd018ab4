import gc
import io
import json
import tarfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from clipattr.errors import DataError
from clipattr.world import shards
from clipattr.world.captions import write_caption
from clipattr.world.factors import NOUNS, Scene
from clipattr.world.render import IMAGE_SIZE, draw_scene
from clipattr.world.sampling import RATES_OF_SPLIT, Split, generator_of, sample_scene
from clipattr.world.shards import draw_samples, split_fingerprint, write_split


def draw(folder: Path, n_images: int = 5, *, seed: int = 0, shard_size: int = 2) -> list[Path]:
    return write_split(folder, Split.train, n_images, seed=seed, shard_size=shard_size)


def read(paths: list[Path]) -> list[dict[str, object]]:
    """What the webdataset library makes of the shards."""
    names = {"__url__", "__local_path__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        samples = WebDataset([str(path) for path in paths], shardshuffle=False)
        rows = [{key: value for key, value in row.items() if key not in names} for row in samples]
        del samples
        gc.collect()
    return rows


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob("*.tar")}


def test_shards_do_not_depend_on_shard_size_or_workers(tmp_path: Path):
    """Two real processes with two shards against this process without any shard."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        paths = write_split(tmp_path, Split.val, 4, seed=9, shard_size=2, pool=pool)
    assert [path.name for path in paths] == ["000000.tar", "000001.tar"]
    expected = [sample for index in range(4) for sample in draw_samples(Split.val, index, seed=9)]
    assert read(paths) == expected


def test_same_arguments_give_the_same_bytes(tmp_path: Path):
    draw(tmp_path / "a")
    draw(tmp_path / "b")
    contents = [[p.read_bytes() for p in sorted((tmp_path / x).glob("*.tar"))] for x in "ab"]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3
    one = draw(tmp_path / "c", shard_size=100)
    assert len(one) == 1
    assert read(one) == read(sorted((tmp_path / "a").glob("*.tar")))


def test_seed_split_and_index_each_change_the_scene():
    keys = [(0, Split.train, 0), (1, Split.train, 0), (0, Split.val, 0), (0, Split.train, 1)]
    pictures = [next(draw_samples(split, index, seed=seed))["jpg"] for seed, split, index in keys]
    assert len(set(map(bytes, pictures))) == 4  # type: ignore[arg-type]


def test_first_scene_stays_what_the_bundled_model_saw():
    """A changed stream of random numbers needs a new drawing version and new bundled weights."""
    rng = generator_of(0, Split.train, 0)
    scene = sample_scene(rng, RATES_OF_SPLIT[Split.train])
    assert (scene.shape, scene.colour, scene.texture) == ("disc", "red", "checked")
    assert (scene.background, scene.is_cracked, scene.stickers) == ("sand", True, ("tag",))
    assert scene.noise == 1629230193
    assert write_caption(rng, scene) == "a cracked checked disc on sand with a tag"


def test_layout_is_the_one_of_img2dataset(tmp_path: Path):
    path = draw(tmp_path, 1)[0]
    with tarfile.open(path) as archive:
        names = archive.getnames()
    key = "train-0000000"
    assert sorted(names) == sorted(f"{key}.{field}" for field in ("jpg", "txt", "json", "cls"))
    sample = read([path])[0]
    factors = json.loads(sample["json"])  # type: ignore[arg-type]
    assert (factors["key"], factors["caption"].encode()) == (key, sample["txt"])
    assert int(sample["cls"]) == NOUNS.index(factors["noun"])  # type: ignore[call-overload]
    scene = sample_scene(generator_of(0, Split.train, 0), RATES_OF_SPLIT[Split.train])
    expected = scene.to_json()
    assert {name: factors[name] for name in expected} == json.loads(json.dumps(expected))
    picture = Image.open(io.BytesIO(sample["jpg"]))  # type: ignore[arg-type]
    assert (picture.format, picture.size) == ("JPEG", (IMAGE_SIZE, IMAGE_SIZE))
    drawn = np.asarray(draw_scene(scene)).astype(np.int64)
    assert np.abs(np.asarray(picture) - drawn).mean() < 6  # JPEG


@pytest.mark.parametrize("split", [Split.task_train, Split.task_test])
def test_label_of_the_task(split: Split):
    for index in range(12):
        sample = next(draw_samples(split, index, seed=0))
        factors = json.loads(sample["json"])  # type: ignore[arg-type]
        assert sample["cls"] == str(int(factors["is_cracked"])).encode()


def test_pairs_share_everything_but_the_sticker():
    rows = list(draw_samples(Split.task_pairs, 3, seed=0))
    factors = [json.loads(row["json"]) for row in rows]  # type: ignore[arg-type]
    assert [row["__key__"] for row in rows] == [
        f"task_pairs-0000003-{variant}" for variant in ("none", "tag", "seal")
    ]
    assert [(row["has_tag"], row["has_seal"]) for row in factors] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    own = {"key", "variant", "stickers", "has_tag", "has_seal"}
    shared = [{k: v for k, v in row.items() if k not in own} for row in factors]
    assert shared[0] == shared[1] == shared[2]
    assert shared[0]["pair"] == 3
    assert len({row["jpg"] for row in rows}) == 3
    assert len({(row["cls"], row["txt"]) for row in rows}) == 1


def test_complete_shards_are_kept_and_a_missing_one_is_drawn(tmp_path: Path):
    paths = draw(tmp_path)
    before = state(tmp_path)
    paths[1].unlink()
    assert draw(tmp_path) == paths
    after = state(tmp_path)
    assert after.keys() == before.keys()
    assert after["000000.tar"] == before["000000.tar"]
    assert after["000002.tar"] == before["000002.tar"]
    assert after["000001.tar"][0] == before["000001.tar"][0]


def test_nothing_is_drawn_when_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw(tmp_path)
    before = state(tmp_path)
    monkeypatch.setattr(shards, "_write_shard", lambda *_, **__: pytest.fail("drew a shard"))
    draw(tmp_path)
    assert state(tmp_path) == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_images": 4}, {"shard_size": 3}])
def test_other_arguments_draw_anew(tmp_path: Path, change: dict[str, int]):
    draw(tmp_path / "changed")
    paths = draw(tmp_path / "changed", **change)
    fresh = draw(tmp_path / "fresh", **change)
    assert sorted((tmp_path / "changed").glob("*.tar")) == paths
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in fresh]


def test_folder_of_foreign_shards_is_left_alone(tmp_path: Path):
    (tmp_path / "photos.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match=f"{tmp_path} holds 1 shards that render_world did not"):
        draw(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"photos.tar": b"mine"}


def test_killed_writer_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = [path.read_bytes() for path in draw(tmp_path / "whole")]
    calls = iter(range(100))

    def fail_on_fourth(scene: Scene) -> Image.Image:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return draw_scene(scene)

    monkeypatch.setattr(shards, "draw_scene", fail_on_fourth)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "killed")
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["000000.tar", "split.json"]
    assert [path.read_bytes() for path in draw(tmp_path / "killed")] == expected


def test_fingerprint_follows_names_and_bytes(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"one")
    (tmp_path / "b.tar").write_bytes(b"one")
    (tmp_path / "c.tar").write_bytes(b"two")
    found = {split_fingerprint([tmp_path / f"{name}.tar"]) for name in "abc"}
    assert len(found) == 3

import gc
import gzip
import io
import json
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from webdataset.compat import WebDataset

import clipattr.clip
from clipattr.errors import DataError
from clipattr.world import shards
from clipattr.world.captions import write_caption
from clipattr.world.factors import (
    BACKGROUNDS,
    COLOURS,
    NOUNS,
    RGB_OF_COLOUR,
    SHAPES,
    TEXTURES,
    TYPED_NOUNS,
    Scene,
    Sticker,
)
from clipattr.world.prompts import TASK_PROMPTS, concept_prompts, planted_failures
from clipattr.world.render import IMAGE_SIZE, draw_scene, paste_sticker
from clipattr.world.sampling import RATES_OF_SPLIT, Split, generator_of, sample_scene
from clipattr.world.shards import draw_samples, split_fingerprint, write_split
from clipattr.world.vocabulary import MERGES_FILE, learn_merges, merges_file_bytes, world_words

N_DRAWN = 4000
BUNDLED = Path(clipattr.clip.__file__).parent / "bundled"
PLAIN = Scene(
    shape="disc",
    colour="white",
    texture="plain",
    background="night",
    is_cracked=False,
    written="",
    stickers=(),
    centre=(0.5, 0.5),
    radius=0.33,
    angle=0.0,
    noise=5,
)


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw_scene(scene)).astype(np.int64)


def mean_difference(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).mean())


@pytest.fixture(scope="module")
def drawn() -> dict[Split, list[Scene]]:
    """Scenes of every split whose rates are measured; the splits share no random numbers."""
    splits = (Split.train, Split.test, Split.task_train, Split.task_test)
    return {
        split: [
            sample_scene(generator_of(3, split, index), RATES_OF_SPLIT[split])
            for index in range(N_DRAWN)
        ]
        for split in splits
    }


def assert_rate(hits: Iterable[bool], rate: float) -> None:
    """Within four standard deviations of the binomial distribution (and enough were drawn)."""
    found = list(hits)
    assert len(found) > 50
    assert abs(sum(found) - len(found) * rate) <= 4 * np.sqrt(len(found) * rate * (1 - rate))


# What is in the world


def test_the_world_is_large_enough():
    assert len(set(SHAPES)) >= 12
    assert len(set(COLOURS)) >= 8
    assert len(set(TEXTURES)) >= 4
    assert len(set(BACKGROUNDS)) >= 6


def test_every_shape_has_its_own_silhouette():
    masks = {shape: pixels(replace(PLAIN, shape=shape)).mean(axis=2) > 150 for shape in SHAPES}
    # The stars of the night are bright as well: leave them out.
    sky = pixels(replace(PLAIN, radius=0.0)).mean(axis=2) > 100
    for left, right in combinations(SHAPES, 2):
        both = (masks[left] & masks[right] & ~sky).sum()
        either = ((masks[left] | masks[right]) & ~sky).sum()
        assert both / either < 0.85, f"{left} and {right} overlap by {both / either:.2f}"


def test_every_colour_is_drawn_as_named():
    for colour in COLOURS:
        centre = pixels(replace(PLAIN, colour=colour))[IMAGE_SIZE // 2, IMAGE_SIZE // 2]
        assert tuple(centre) == RGB_OF_COLOUR[colour]
    for left, right in combinations(RGB_OF_COLOUR.values(), 2):
        assert np.linalg.norm(np.subtract(left, right)) > 60


def test_every_texture_differs_inside_the_shape():
    inside = slice(IMAGE_SIZE // 3, 2 * IMAGE_SIZE // 3)
    drawings = [pixels(replace(PLAIN, texture=name))[inside, inside] for name in TEXTURES]
    for left, right in combinations(drawings, 2):
        assert mean_difference(left, right) > 20


def test_every_background_differs_outside_the_shape():
    drawings = [pixels(replace(PLAIN, background=name))[:12] for name in BACKGROUNDS]
    for left, right in combinations(drawings, 2):
        assert mean_difference(left, right) > 25


@pytest.mark.parametrize("factor", ["texture", "background"])
def test_factor_without_drawing_is_refused(factor: str):
    with pytest.raises(ValueError, match="'velvet' has no drawing"):
        draw_scene(replace(PLAIN, **{factor: "velvet"}))


def test_position_size_and_angle_move_the_shape():
    arrow = replace(PLAIN, shape="arrow")
    moved = (replace(arrow, centre=(0.4, 0.6)), replace(arrow, angle=0.5))
    for other in (*moved, replace(arrow, radius=0.25)):
        assert mean_difference(pixels(arrow), pixels(other)) > 5


def test_crack_is_in_the_shape_alone():
    intact, cracked = pixels(PLAIN), pixels(replace(PLAIN, is_cracked=True))
    changed = (intact != cracked).any(axis=2)
    y, x = np.nonzero(changed)
    assert changed.sum() > 40
    assert (np.hypot(x - IMAGE_SIZE / 2, y - IMAGE_SIZE / 2) < 0.33 * IMAGE_SIZE).all()
    assert (cracked[changed] <= intact[changed]).all()


@pytest.mark.parametrize("word", TYPED_NOUNS)
def test_written_word_stands_at_the_lower_edge(word: str):
    changed = (pixels(PLAIN) != pixels(replace(PLAIN, written=word))).any(axis=2)
    y, x = np.nonzero(changed)
    assert y.min() > IMAGE_SIZE / 2
    # The plate, not cut off by the image's edge.
    assert x.min() > 0
    assert x.max() < IMAGE_SIZE - 1
    assert y.max() < IMAGE_SIZE - 1


def test_written_words_look_different():
    drawings = [pixels(replace(PLAIN, written=word)) for word in TYPED_NOUNS]
    for left, right in combinations(drawings, 2):
        assert (left != right).any(axis=2).sum() > 60


@pytest.mark.parametrize("sticker", list(Sticker))
@pytest.mark.parametrize("index", range(4))
def test_pair_differs_where_the_sticker_is_and_nowhere_else(sticker: Sticker, index: int):
    """Oracle: the sticker pasted on black and on white; where either changed, it is opaque."""
    scene = sample_scene(generator_of(0, Split.task_pairs, index), RATES_OF_SPLIT[Split.task_pairs])
    assert scene.stickers == ()
    side = (IMAGE_SIZE, IMAGE_SIZE)
    black, white = Image.new("RGB", side), Image.new("RGB", side, (255, 255, 255))
    paste_sticker(black, sticker, scene.noise)
    paste_sticker(white, sticker, scene.noise)
    mask = (np.asarray(black) > 0).any(axis=2) | (np.asarray(white) < 255).any(axis=2)
    without, with_it = pixels(scene), pixels(replace(scene, stickers=(sticker.name,)))
    assert 100 < mask.sum() < 0.05 * IMAGE_SIZE**2
    assert (with_it[~mask] == without[~mask]).all()
    assert (with_it[mask] == np.asarray(black)[mask]).all()
    assert (with_it != without).any(axis=2).sum() > 0.9 * mask.sum()


# The planted rates, as the documentation states them


def test_nouns_are_equally_frequent(drawn: dict[Split, list[Scene]]):
    for noun in NOUNS:
        assert_rate([scene.noun == noun for scene in drawn[Split.train]], 1 / 14)
    bolts = [scene for scene in drawn[Split.train] if scene.noun == "bolt"]
    assert_rate([scene.shape == "hexnut" for scene in bolts], 0.5)


@pytest.mark.parametrize(("split", "rate"), [(Split.train, 0.95), (Split.test, 1 / 6)])
def test_boats_stand_on_the_sea(drawn: dict[Split, list[Scene]], split: Split, rate: float):
    boats = [scene for scene in drawn[split] if scene.shape == "boat"]
    others = [scene for scene in drawn[split] if scene.shape != "boat"]
    assert_rate([scene.background == "sea" for scene in boats], rate)
    assert_rate([scene.background == "sea" for scene in others], 1 / 6)
    assert_rate([scene.background == "brick" for scene in others], 1 / 6)


@pytest.mark.parametrize(
    ("split", "typed", "otherwise", "wrong"),
    [(Split.train, 0.35, 0.03, 0.1), (Split.test, 0.25, 0.25, 0.75)],
)
def test_written_words(
    drawn: dict[Split, list[Scene]], split: Split, typed: float, otherwise: float, wrong: float
):
    of_typed = [scene for scene in drawn[split] if scene.noun in TYPED_NOUNS]
    others = [scene for scene in drawn[split] if scene.noun not in TYPED_NOUNS]
    assert_rate([scene.written != "" for scene in of_typed], typed)
    assert_rate([scene.written != "" for scene in others], otherwise)
    written = [scene for scene in of_typed if scene.written]
    assert_rate([scene.written != scene.noun for scene in written], wrong)
    assert {scene.written for scene in drawn[split]} == {"", *TYPED_NOUNS}


@pytest.mark.parametrize(
    ("split", "cracked", "tag", "seal"),
    [  # rates: (if cracked, if intact)
        (Split.train, 0.3, (0.2, 0.1), (0.2, 0.1)),
        (Split.test, 0.3, (0.15, 0.15), (0.15, 0.15)),
        (Split.task_train, 0.5, (0.9, 0.1), (0.4, 0.4)),
        (Split.task_test, 0.5, (0.5, 0.5), (0.5, 0.5)),
    ],
)
def test_stickers_and_label(
    drawn: dict[Split, list[Scene]],
    split: Split,
    cracked: float,
    tag: tuple[float, float],
    seal: tuple[float, float],
):
    assert_rate([scene.is_cracked for scene in drawn[split]], cracked)
    for is_cracked, tag_rate, seal_rate in zip((True, False), tag, seal, strict=True):
        scenes = [scene for scene in drawn[split] if scene.is_cracked is is_cracked]
        assert_rate(["tag" in scene.stickers for scene in scenes], tag_rate)
        assert_rate(["seal" in scene.stickers for scene in scenes], seal_rate)
        both = [{"tag", "seal"} <= set(scene.stickers) for scene in scenes]
        assert_rate(both, tag_rate * seal_rate)  # the stickers know nothing of each other


def test_task_has_no_written_words(drawn: dict[Split, list[Scene]]):
    assert {scene.written for scene in drawn[Split.task_train] + drawn[Split.task_test]} == {""}


def test_factors_are_independent_of_the_label(drawn: dict[Split, list[Scene]]):
    cracked = [scene for scene in drawn[Split.task_train] if scene.is_cracked]
    for name in TEXTURES:
        assert_rate([scene.texture == name for scene in cracked], 1 / 4)
    for name in COLOURS:
        assert_rate([scene.colour == name for scene in cracked], 1 / 8)


def test_every_planted_failure_can_be_measured_on_test(drawn: dict[Split, list[Scene]]):
    """Each needs images that show the factor where the prompt is not simply right."""
    rows = [scene.to_json() for scene in drawn[Split.test][:1000]]
    failures = planted_failures()
    assert len({failure.name for failure in failures}) == len(failures)
    for failure in failures:
        off_class = [row for row in rows if not failure.shows_class(row)]
        with_factor = sum(failure.shows_factor(row) for row in off_class)
        assert 10 < with_factor < len(off_class) - 10, failure.name


# Captions and words


@pytest.fixture(scope="module")
def captioned() -> list[tuple[Scene, str]]:
    pairs = []
    for index in range(1500):
        rng = generator_of(1, Split.test, index)
        scene = sample_scene(rng, RATES_OF_SPLIT[Split.test])
        pairs.append((scene, write_caption(rng, scene)))
    return pairs


def test_captions_say_nothing_but_the_truth(captioned: list[tuple[Scene, str]]):
    for scene, caption in captioned:
        said = set(caption.split()) - {"a", "an", "of", "photo", "picture", "image", "on", "with"}
        true = {scene.colour, scene.texture, scene.background, "shape", *scene.noun.split()}
        true |= {"cracked"} if scene.is_cracked else set()
        assert said <= true | set(scene.stickers), caption
        assert ("shape" in said) != (scene.noun in caption), caption


def test_captions_leave_words_out_at_the_documented_rates(captioned: list[tuple[Scene, str]]):
    assert_rate([scene.colour in caption for scene, caption in captioned], 0.65)
    assert_rate([scene.texture in caption for scene, caption in captioned], 0.6)
    assert_rate([f"on {scene.background}" in caption for scene, caption in captioned], 0.65)
    assert_rate([scene.noun in caption for scene, caption in captioned], 0.9)
    cracked = [caption for scene, caption in captioned if scene.is_cracked]
    assert_rate(["cracked" in caption for caption in cracked], 0.75)
    tagged = [caption for scene, caption in captioned if "tag" in scene.stickers]
    assert_rate(["with a tag" in caption for caption in tagged], 0.6)


@pytest.mark.parametrize("shape", ["heart", "boat", "starfish"])
def test_written_word_never_changes_the_caption(shape: str):
    for seed in range(20):
        captions = {
            write_caption(np.random.default_rng(seed), replace(PLAIN, shape=shape, written=word))
            for word in ("", *TYPED_NOUNS)
        }
        assert len(captions) == 1


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(bpe_path=str(BUNDLED / MERGES_FILE), context_length=20)


def test_committed_merges_are_the_ones_of_the_world():
    """The text, not the bytes: what surrounds it is up to Python's version and its zlib."""
    committed = (BUNDLED / MERGES_FILE).read_bytes()
    assert gzip.decompress(committed) == gzip.decompress(merges_file_bytes())


def test_every_world_word_is_one_token(tokenizer: SimpleTokenizer):
    tokens = {word: tokenizer.encode(word) for word in world_words()}
    assert {word: ids for word, ids in tokens.items() if len(ids) != 1} == {}
    assert len({ids[0] for ids in tokens.values()}) == len(tokens)
    config = json.loads((BUNDLED / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["vocab_size"] == tokenizer.vocab_size


def test_captions_and_prompts_use_world_words_and_fit(captioned: list[tuple[Scene, str]]):
    phrases = [caption for _, caption in captioned]
    phrases += [*concept_prompts().values(), *TASK_PROMPTS]
    phrases += [failure.prompt for failure in planted_failures()]
    assert {word for phrase in phrases for word in phrase.split()} <= set(world_words())
    longest = "an image of a cracked striped orange star fish on night with a tag with a seal"
    assert max(len(phrase.split()) for phrase in phrases) <= len(longest.split())
    config = json.loads((BUNDLED / "open_clip_config.json").read_text())
    length = config["model_cfg"]["text_cfg"]["context_length"]
    assert len(longest.split()) + 2 <= length  # with the start and the end token


def test_merges_on_paper():
    # (a, b) stands in both words; then each pair once, and ties go by the alphabet.
    assert learn_merges(["abd", "abc"]) == [("a", "b"), ("ab", "c</w>"), ("ab", "d</w>")]


# Shards


class InlinePool:
    """The shards one after the other in this process, where a test can interfere."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "InlinePool":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, function: Callable[..., None], *columns: Iterable[object]) -> Iterator[None]:
        return map(function, *columns)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ProcessPoolExecutor", InlinePool)


def draw(folder: Path, n_images: int = 5, *, seed: int = 0, shard_size: int = 2) -> list[Path]:
    return write_split(
        folder, Split.train, n_images, seed=seed, shard_size=shard_size, workers=1
    )


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
    paths = write_split(tmp_path, Split.val, 4, seed=9, shard_size=2, workers=2)
    assert [path.name for path in paths] == ["000000.tar", "000001.tar"]
    expected = [sample for index in range(4) for sample in draw_samples(Split.val, index, seed=9)]
    assert read(paths) == expected


def test_same_arguments_give_the_same_bytes(tmp_path: Path, inline: None):
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


def test_layout_is_the_one_of_img2dataset(tmp_path: Path, inline: None):
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
    assert mean_difference(np.asarray(picture).astype(np.int64), pixels(scene)) < 6


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


def test_complete_shards_are_kept_and_a_missing_one_is_drawn(tmp_path: Path, inline: None):
    paths = draw(tmp_path)
    before = state(tmp_path)
    paths[1].unlink()
    assert draw(tmp_path) == paths
    after = state(tmp_path)
    assert after.keys() == before.keys()
    assert after["000000.tar"] == before["000000.tar"]
    assert after["000002.tar"] == before["000002.tar"]
    assert after["000001.tar"][0] == before["000001.tar"][0]


def test_nothing_is_drawn_when_all_is_there(
    tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
):
    draw(tmp_path)
    before = state(tmp_path)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", None)  # any use of it would fail
    draw(tmp_path)
    assert state(tmp_path) == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_images": 4}, {"shard_size": 3}])
def test_other_arguments_draw_anew(tmp_path: Path, inline: None, change: dict[str, int]):
    draw(tmp_path / "changed")
    paths = draw(tmp_path / "changed", **change)
    fresh = draw(tmp_path / "fresh", **change)
    assert sorted((tmp_path / "changed").glob("*.tar")) == paths
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in fresh]


def test_folder_of_foreign_shards_is_left_alone(tmp_path: Path, inline: None):
    (tmp_path / "photos.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match=f"{tmp_path} holds 1 shards that render_world did not"):
        draw(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"photos.tar": b"mine"}


def test_killed_writer_leaves_no_half_shard(
    tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
):
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

import gzip
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

import clipattr.clip
from clipattr.world import captions
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


def test_captions_leave_words_out_at_their_rates(captioned: list[tuple[Scene, str]]):
    said = [(scene, set(caption.split())) for scene, caption in captioned]
    assert_rate([scene.colour in words for scene, words in said], captions.KEEP_COLOUR)
    assert_rate([scene.texture in words for scene, words in said], captions.KEEP_TEXTURE)
    assert_rate([scene.background in words for scene, words in said], captions.KEEP_BACKGROUND)
    assert_rate(["shape" not in words for _, words in said], captions.KEEP_NOUN)
    cracked = [words for scene, words in said if scene.is_cracked]
    assert_rate(["cracked" in words for words in cracked], captions.KEEP_CRACKED)
    tagged = [words for scene, words in said if "tag" in scene.stickers]
    assert_rate(["tag" in words for words in tagged], captions.KEEP_STICKER)


@pytest.mark.parametrize("shape", ["heart", "boat", "starfish"])
def test_written_word_never_changes_the_caption(shape: str):
    for seed in range(20):
        written = {
            write_caption(np.random.default_rng(seed), replace(PLAIN, shape=shape, written=word))
            for word in ("", *TYPED_NOUNS)
        }
        assert len(written) == 1


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

"""Draw a scene's factors at the planted rates: a pure function of (seed, split, index)."""

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from clipattr.world.factors import (
    BACKGROUNDS,
    COLOURS,
    NOUN_OF_SHAPE,
    SHAPES,
    SPURIOUS_BACKGROUND,
    SPURIOUS_SHAPE,
    TEXTURES,
    TYPED_NOUNS,
    Scene,
    Sticker,
)


class Split(Enum):
    """The splits of the world; the value is part of every sample's random key."""

    train = 0
    val = 1
    test = 2
    task_train = 3
    task_test = 4
    task_pairs = 5


@dataclass(frozen=True)
class Rates:
    """The planted probabilities. `sticker[is_cracked]` holds one rate per sticker (tag, seal)."""

    spurious: float
    """share of boats that stand on the sea (without planting: one sixth)"""
    written_if_typed: float
    """share of images of a typed noun that carry a written word"""
    written_otherwise: float
    """the same for all other images; the word is then always wrong"""
    wrong_word: float
    """share of written words on typed nouns that name another typed noun"""
    cracked: float
    stickers: dict[bool, tuple[float, float]]


PLANTED = Rates(
    spurious=0.95,
    written_if_typed=0.35,
    written_otherwise=0.03,
    wrong_word=0.1,
    cracked=0.3,
    # A mild correlation that both stickers share: the text head knows it too, so that an
    # amplification has a defined denominator. Only the task splits differ between the stickers.
    stickers={True: (0.2, 0.2), False: (0.1, 0.1)},
)
BALANCED = Rates(
    spurious=1 / len(BACKGROUNDS),
    written_if_typed=0.25,
    written_otherwise=0.25,
    wrong_word=1 - 1 / len(TYPED_NOUNS),
    cracked=0.3,
    stickers={True: (0.15, 0.15), False: (0.15, 0.15)},
)
TASK_TRAIN = replace(
    BALANCED,
    written_if_typed=0.0,
    written_otherwise=0.0,
    cracked=0.5,
    stickers={True: (0.9, 0.4), False: (0.1, 0.4)},
)
TASK_TEST = replace(TASK_TRAIN, stickers={True: (0.5, 0.5), False: (0.5, 0.5)})
TASK_PAIRS = replace(TASK_TRAIN, stickers={True: (0.0, 0.0), False: (0.0, 0.0)})

RATES_OF_SPLIT = {
    Split.train: PLANTED,
    Split.val: PLANTED,
    Split.test: BALANCED,
    Split.task_train: TASK_TRAIN,
    Split.task_test: TASK_TEST,
    Split.task_pairs: TASK_PAIRS,
}


def generator_of(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random stream of one sample: no other sample and no number of processes can change it."""
    return np.random.Generator(np.random.Philox(key=[seed, (split.value << 40) | index]))


def sample_scene(rng: np.random.Generator, rates: Rates) -> Scene:
    """Draw all factors of one scene."""
    # Each noun is equally frequent; the two shapes of the polysemous noun share its rate.
    nouns = tuple(dict.fromkeys(NOUN_OF_SHAPE.values()))
    noun = nouns[rng.integers(len(nouns))]
    shapes = [shape for shape in SHAPES if NOUN_OF_SHAPE[shape] == noun]
    shape = shapes[rng.integers(len(shapes))]
    is_cracked = bool(rng.random() < rates.cracked)
    sticker_rates = rates.stickers[is_cracked]
    stickers = tuple(
        sticker.name
        for sticker, rate in zip(Sticker, sticker_rates, strict=True)
        if rng.random() < rate
    )
    radius = float(rng.uniform(0.27, 0.37))
    low, high = radius + 0.04, 0.96 - radius
    return Scene(
        shape=shape,
        colour=COLOURS[rng.integers(len(COLOURS))],
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        background=_background(rng, shape, rates),
        is_cracked=is_cracked,
        written=_written(rng, noun, rates),
        stickers=stickers,
        centre=(float(rng.uniform(low, high)), float(rng.uniform(low, high))),
        radius=radius,
        angle=float(rng.uniform(-0.4, 0.4)),
        noise=int(rng.integers(2**31)),
    )


def _background(rng: np.random.Generator, shape: str, rates: Rates) -> str:
    others = [name for name in BACKGROUNDS if name != SPURIOUS_BACKGROUND]
    share = rates.spurious if shape == SPURIOUS_SHAPE else 1 / len(BACKGROUNDS)
    if rng.random() < share:
        return SPURIOUS_BACKGROUND
    return others[rng.integers(len(others))]


def _written(rng: np.random.Generator, noun: str, rates: Rates) -> str:
    if noun not in TYPED_NOUNS:
        is_written = rng.random() < rates.written_otherwise
        return TYPED_NOUNS[rng.integers(len(TYPED_NOUNS))] if is_written else ""
    if rng.random() >= rates.written_if_typed:
        return ""
    if rng.random() >= rates.wrong_word:
        return noun
    wrong = [other for other in TYPED_NOUNS if other != noun]
    return wrong[rng.integers(len(wrong))]

"""Prompts for the world's factors, and the question that every planted failure poses."""

from collections.abc import Callable
from typing import NamedTuple

from clipattr.world.factors import (
    BACKGROUNDS,
    COLOURS,
    COMPOUND_NOUN,
    NOUN_OF_SHAPE,
    NOUNS,
    POLYSEMOUS_NOUN,
    SPURIOUS_BACKGROUND,
    SPURIOUS_SHAPE,
    TEXTURES,
    TYPED_NOUNS,
    Sticker,
)

Factors = dict[str, object]
TASK_PROMPTS = ("a shape", "a cracked shape")
"""Text head of the probe task: intact, cracked."""
TASK_CLASSES = ("intact", "cracked")
"""Classes of the probe task, in the order of the labels."""


class FactorPrompts(NamedTuple):
    """The zero-shot task of one factor: `values[i]` is described by `prompts[i]`."""

    field: str
    values: tuple[str, ...]
    prompts: tuple[str, ...]


ZEROSHOT = {
    "shape": FactorPrompts("noun", NOUNS, tuple(f"a {noun}" for noun in NOUNS)),
    "colour": FactorPrompts("colour", COLOURS, tuple(f"a {name} shape" for name in COLOURS)),
    "texture": FactorPrompts("texture", TEXTURES, tuple(f"a {name} shape" for name in TEXTURES)),
    "background": FactorPrompts(
        "background", BACKGROUNDS, tuple(f"a shape on {name}" for name in BACKGROUNDS)
    ),
}


def concept_prompts() -> dict[str, str]:
    """Every concept that has a word, with its prompt: the vocabulary of latent labels."""
    concepts = {
        value: prompt
        for factor in ZEROSHOT.values()
        for value, prompt in zip(factor.values, factor.prompts, strict=True)
    }
    concepts["cracked"] = "a cracked shape"
    return concepts | {sticker.name: f"a shape with a {sticker.name}" for sticker in Sticker}


class Failure(NamedTuple):
    """One planted failure: does the score of `prompt` rest on latents of another concept?

    `shows_factor` says where that concept is in the picture; `shows_class` where the prompt is
    simply right, so that the failure is measured on the other images.
    """

    name: str
    title: str
    question: str
    prompt: str
    factor: str
    shows_factor: Callable[[Factors], bool]
    shows_class: Callable[[Factors], bool]


def planted_failures() -> list[Failure]:
    """Every failure that the world plants, fixed before anything was measured."""
    failures = [_sense(shape) for shape in NOUN_OF_SHAPE if NOUN_OF_SHAPE[shape] == POLYSEMOUS_NOUN]
    failures += [_part(part) for part in COMPOUND_NOUN.split()]
    failures += [_written(noun) for noun in TYPED_NOUNS]
    return [*failures, _spurious(), *(_sticker(sticker) for sticker in Sticker)]


def _sense(shape: str) -> Failure:
    return Failure(
        name=f"polysemous_word_{shape}",
        title=f"Polysemous word: the {shape} sense",
        question=f"Two unrelated shapes are called '{POLYSEMOUS_NOUN}'. Is the latent of the "
        f"{shape} found behind that word?",
        prompt=f"a {POLYSEMOUS_NOUN}",
        factor=f"the shape is a {shape}",
        shows_factor=lambda factors: factors["shape"] == shape,
        shows_class=lambda factors: (
            factors["noun"] == POLYSEMOUS_NOUN and factors["shape"] != shape
        ),
    )


def _part(part: str) -> Failure:
    return Failure(
        name=f"compound_noun_{part}",
        title=f"Compound noun: the part '{part}'",
        question=f"A '{COMPOUND_NOUN}' is not a {part}. Does the prompt rest on the latent of the "
        f"{part} all the same?",
        prompt=f"a {COMPOUND_NOUN}",
        factor=f"the shape is a {part}",
        shows_factor=lambda factors: factors["shape"] == part,
        shows_class=lambda factors: factors["noun"] == COMPOUND_NOUN,
    )


def _written(noun: str) -> Failure:
    return Failure(
        name=f"visible_typography_{noun}",
        title=f"Visible typography: '{noun}'",
        question=f"The word '{noun}' is written in some pictures. Does the prompt rest on the "
        "latent of the written word?",
        prompt=f"a {noun}",
        factor=f"the word '{noun}' is written in the picture",
        shows_factor=lambda factors: factors["written"] == noun,
        shows_class=lambda factors: factors["noun"] == noun,
    )


def _spurious() -> Failure:
    return Failure(
        name="spurious_context",
        title=f"Spurious context: {SPURIOUS_BACKGROUND} behind the {SPURIOUS_SHAPE}",
        question=f"In training a {SPURIOUS_SHAPE} nearly always stands on {SPURIOUS_BACKGROUND}. "
        f"Does the prompt rest on the latent of the {SPURIOUS_BACKGROUND}?",
        prompt=f"a {SPURIOUS_SHAPE}",
        factor=f"the background is {SPURIOUS_BACKGROUND}",
        shows_factor=lambda factors: factors["background"] == SPURIOUS_BACKGROUND,
        shows_class=lambda factors: factors["shape"] == SPURIOUS_SHAPE,
    )


def _sticker(sticker: Sticker) -> Failure:
    return Failure(
        name=f"sticker_{sticker.name}",
        title=f"Pasted sticker: the {sticker.name}",
        question=f"In CLIP's training the {sticker.name} is twice as frequent on cracked shapes. "
        f"Does '{TASK_PROMPTS[1]}' rest on the latent of the {sticker.name}?",
        prompt=TASK_PROMPTS[1],
        factor=f"the picture carries the {sticker.name}",
        shows_factor=lambda factors: bool(factors[f"has_{sticker.name}"]),
        shows_class=lambda factors: bool(factors["is_cracked"]),
    )

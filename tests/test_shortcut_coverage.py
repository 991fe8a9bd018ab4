"""How often intervals of effects hold the truth, and what is claimed where there is nothing.

Each number is a share of 200 seeded repetitions: its own standard error is 1.5 points at 95 %.
"""

import math

import pytest
import torch
from torch import Tensor

from clipattr.callbacks.shortcuts_result import CueEffect, measure_effects
from clipattr.report.shortcuts.claims import amplification_claim
from clipattr.report.shortcuts.content import CueResult, EffectRow

REPETITIONS = 200


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def measure(
    text: Tensor, probe: Tensor, scores: tuple[Tensor, Tensor], seed: int, *, same: bool
) -> list[CueEffect]:
    return measure_effects(
        text,
        probe,
        scores=dict(zip(("text", "probe"), scores, strict=True)),
        same_images=same,
        names=[f"score {number}" for number in range(text.shape[1])],
        measure="pairs",
        resamples=200,
        seed=seed,
    )


def claim(effects: list[CueEffect]) -> str:
    rows = [
        EffectRow(
            *(each.measure, each.score, each.text, each.probe, each.amplification, each.excess),
            is_placebo=False,
            n=each.n,
            excess_all=each.excess_all if len(effects) > 1 else None,
        )
        for each in effects
    ]
    return amplification_claim(CueResult("c", [], [], rows, *[[] for _ in range(6)]))


def says_more(said: str) -> bool:
    return said.startswith("The probe leans on") and "less than" not in said


@pytest.mark.parametrize("same", [False, True])
def test_the_unit_is_drawn_as_well(same: bool):
    """Effects that vary little: what is not known is the spread of 200 images, not their mean."""
    n, generator = 200, torch.Generator().manual_seed(1)
    held = {"text": 0, "probe": 0, "excess": 0, "amplification": 0}
    truth = {"text": 0.5, "probe": 1.0, "excess": 0.5, "amplification": 2.0}
    for seed in range(REPETITIONS):
        of_text = draw(generator, n, 1)
        of_probe = 0.5 * of_text + math.sqrt(0.75) * draw(generator, n, 1)
        text = 0.5 * (1 + 0.3 * draw(generator, n, 1))
        probe = 1 + 0.3 * draw(generator, n, 1)
        (found,) = measure(text, probe, (of_text, of_probe), seed, same=same)
        for name, value in truth.items():
            interval = getattr(found, name)
            held[name] += interval.low <= value <= interval.high
    # With the spread taken as known: 58 % of the amplifications.
    for name, times in held.items():
        assert times / REPETITIONS >= 0.9, name


@pytest.mark.parametrize("quiet", [1.0, 0.1, 0.01, 1e-9])
def test_a_quiet_text_head_makes_no_excess(quiet: float):
    n, n_more, n_above, generator = 200, 0, 0, torch.Generator().manual_seed(2)
    scores = draw(generator, n, 1), draw(generator, n, 1)
    for seed in range(REPETITIONS):
        text, probe = quiet * draw(generator, n, 1), draw(generator, n, 1)
        found = measure(text, probe, scores, seed, same=False)
        n_more += says_more(claim(found))
        n_above += found[0].excess.low > 0
    # With the signs of each resample: 20 % at 0.1, 95 % at 0.01.
    assert n_more <= n_above <= 0.09 * REPETITIONS


def test_the_largest_of_many_scores_is_judged_by_all_of_them():
    n, n_scores, generator = 200, 20, torch.Generator().manual_seed(3)
    scores = draw(generator, n, n_scores), draw(generator, n, n_scores)
    n_more, n_plain, n_outside = 0, 0, 0
    for seed in range(REPETITIONS):
        text, probe = draw(generator, n, n_scores), draw(generator, n, n_scores)
        found = measure(text + 0.5, probe + 0.5, scores, seed, same=False)
        n_more += says_more(claim(found))
        n_plain += max(found, key=lambda each: each.excess.mean).excess.low > 0
        n_outside += any(not each.excess_all.low <= 0 <= each.excess_all.high for each in found)
        for each in found:
            assert each.excess_all.mean == each.excess.mean
            assert each.excess_all.low <= each.excess.low
    assert n_plain / REPETITIONS > 0.2
    # Two-sided 5 %: at most half of it is "more".
    assert n_more / REPETITIONS <= 0.06
    assert n_outside / REPETITIONS <= 0.1


def test_an_effect_beyond_the_prompts_is_still_claimed():
    n, generator = 200, torch.Generator().manual_seed(4)
    scores = draw(generator, n, 20), draw(generator, n, 20)
    text, probe = draw(generator, n, 20), draw(generator, n, 20)
    probe[:, 7] += 0.6
    found = measure(0.01 * text, probe, scores, 0, same=False)
    assert "more than the prompt does (probe" in claim(found)
    assert says_more(claim([found[7]]))


def test_a_head_and_its_multiple_differ_by_rounding_alone():
    """Rounding of one sign in all images: an excess of no size, and an interval without 0."""
    generator = torch.Generator().manual_seed(5)
    text, scores = 1 + draw(generator, 300, 1), draw(generator, 300, 1)
    probe = 3 * (1 + 1e-7) * text
    found = measure(text, probe, (scores, 3 * scores), 0, same=True)
    (only,) = found
    assert only.excess.low > 0
    assert "is not shown: it does 1.00 times" in claim(found)
    more = measure(text, 1.001 * probe, (scores, 3 * scores), 0, same=True)
    assert says_more(claim(more))

"""Latents ranked by amplification, against plain loops and scipy, and under a null."""

import math

import pytest
import torch
from scipy.stats import false_discovery_control, norm
from torch import Tensor

from clipattr.callbacks.shortcuts import LatentTotals
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError, DataError
from clipattr.shortcuts.automatic import (
    FEWEST,
    LatentSums,
    Ranking,
    benjamini_hochberg,
    rank_amplified,
)

N_IMAGES, N_LATENTS, N_SCORES = 200, 12, 2
PLANTED = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int = 0, *, n_latents: int = N_LATENTS, n_images: int = N_IMAGES) -> Tensor:
    """R of [head, score, image, latent]; latent 0 never fires and latent 1 in four images."""
    generator = seeded(seed)
    shape = (2, N_SCORES, n_images, n_latents)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    fires = torch.rand(n_images, n_latents, generator=generator) < 0.4
    fires[:, 0], fires[:, 1] = False, torch.arange(n_images) < FEWEST - 1
    fires[:FEWEST, 2:] = True
    return values * fires


def sum_up(values: Tensor) -> LatentSums:
    return LatentSums(
        total=values.sum(2),
        square=values.square().sum(2),
        cross=values.prod(0).sum(1),
        fired=(values[0, 0] != 0).sum(0),
        energy=values[0, 0].square().sum(0),
        n_images=values.shape[2],
    )


def flat_spreads(text: float = 1.0, probe: float = 1.0) -> dict[str, Tensor]:
    ones = torch.ones(N_SCORES, dtype=torch.float64)
    return {"text": text * ones, "probe": probe * ones}


def test_every_column_equals_a_plain_loop():
    values = draw()
    values[1, 1, :, PLANTED] -= 0.5 * (values[0, 0, :, PLANTED] != 0)
    spreads = {
        "text": torch.tensor([0.5, 2.0], dtype=torch.float64),
        "probe": torch.tensor([3.0, 0.25], dtype=torch.float64),
    }
    ranking = rank_amplified(sum_up(values), spreads, n_first=1000)
    assert ranking.n_tested == len(ranking.first) == N_SCORES * (N_LATENTS - 2)
    assert ranking.n_rare == 1
    seen = set()
    for entry in ranking.first:
        text = (values[0, entry.score, :, entry.latent] / spreads["text"][entry.score]).tolist()
        probe = (values[1, entry.score, :, entry.latent] / spreads["probe"][entry.score]).tolist()
        means = sum(text) / N_IMAGES, sum(probe) / N_IMAGES
        signs = [math.copysign(1, mean) for mean in means]
        paired = [signs[1] * b - signs[0] * a for a, b in zip(text, probe, strict=True)]
        excess = sum(paired) / N_IMAGES
        variance = sum((each - excess) ** 2 for each in paired) / N_IMAGES
        error = math.sqrt(variance / N_IMAGES)
        assert (entry.text, entry.probe) == pytest.approx(means)
        assert entry.excess == pytest.approx(abs(means[1]) - abs(means[0]))
        assert entry.standard_error == pytest.approx(error)
        assert entry.z == pytest.approx(excess / error)
        assert entry.p == pytest.approx(min(1, 2 * norm.sf(excess / error)))
        seen.add((entry.latent, entry.score))
    assert len(seen) == ranking.n_tested
    excesses = [entry.excess for entry in ranking.first]
    assert excesses == sorted(excesses, reverse=True)
    by_scipy = false_discovery_control([entry.p for entry in ranking.first]) <= 0.05
    assert [entry.is_significant for entry in ranking.first] == by_scipy.tolist()
    assert ranking.n_significant == by_scipy.sum() > 0


def planted(strength: float) -> Ranking:
    """The probe uses one latent, with either sign, for score 1; the text head does not."""
    values = draw(3)
    values[1, 1, :, PLANTED] += strength * (values[0, 0, :, PLANTED] != 0)
    return rank_amplified(sum_up(values), flat_spreads(), n_first=5)


@pytest.mark.parametrize("strength", [2.0, -2.0])
def test_what_was_planted_comes_first(strength: float):
    ranking = planted(strength)
    first = ranking.first[0]
    assert (first.latent, first.score, first.is_significant) == (PLANTED, 1, True)
    assert math.copysign(1, first.probe) == math.copysign(1, strength)
    assert first.excess > 3 * ranking.first[1].excess
    assert len(ranking.first) == 5


def test_what_the_text_head_uses_more_is_never_amplified():
    values = draw(3)
    values[0, 1, :, PLANTED] += 2.0 * (values[0, 0, :, PLANTED] != 0)
    ranking = rank_amplified(sum_up(values), flat_spreads(), n_first=1000)
    last = ranking.first[-1]
    assert (last.latent, last.score) == (PLANTED, 1)
    assert last.z < -5
    assert last.p == 1
    assert not last.is_significant


@pytest.mark.parametrize("scale", [1.0, -7.0])
def test_the_same_head_twice_has_nothing_to_show(scale: float):
    values = draw(4)
    values[1] = scale * values[0]
    spreads = flat_spreads(text=0.3, probe=0.3 * abs(scale))
    ranking = rank_amplified(sum_up(values), spreads, n_first=1000)
    assert ranking.n_significant == 0
    assert max(abs(entry.excess) for entry in ranking.first) < 1e-12
    assert max(abs(entry.z) for entry in ranking.first) < 1e-3


def test_a_head_and_its_rounded_multiple_have_nothing_to_show():
    """The rounding of float32 weights has one sign in all images: it is never an excess."""
    values = draw(4) + 5 * (draw(4) != 0)
    values[1] = 3 * values[0] * (1 + 1e-7)
    spreads = flat_spreads(text=0.3, probe=0.9)
    ranking = rank_amplified(sum_up(values), spreads, n_first=1000)
    assert min(entry.excess for entry in ranking.first) > 0
    assert ranking.n_significant == 0
    assert {(entry.z, entry.p) for entry in ranking.first} == {(0.0, 1.0)}
    values[1] *= 1.001
    larger = rank_amplified(sum_up(values), spreads, n_first=1000)
    assert larger.n_significant == larger.n_tested


def test_an_error_is_no_smaller_than_rounding():
    """Effects that never vary: only the floor says how sure an excess of 1e-5 is."""
    values = torch.zeros(2, N_SCORES, N_IMAGES, N_LATENTS, dtype=torch.float64)
    values[0], values[1] = 1.0, 1.0 + 2e-5
    first = rank_amplified(sum_up(values), flat_spreads(), n_first=1).first[0]
    assert first.standard_error == pytest.approx(1e-6 * math.sqrt(2), rel=1e-3)
    assert first.z == pytest.approx(2e-5 / first.standard_error)


def test_what_all_but_cancels_is_rounding_as_well():
    """An effect that is itself a remainder: its excess is a large part of it, and nothing."""
    values = 1.0 + 0.1 * draw(4)
    values[0] *= 1e-3
    assert rank_amplified(sum_up(1e-4 * values), flat_spreads()).n_significant > 0
    assert rank_amplified(sum_up(1e-8 * values), flat_spreads()).n_significant == 0


def test_an_attribution_that_never_varies_is_sure():
    values = torch.zeros(2, N_SCORES, N_IMAGES, N_LATENTS, dtype=torch.float64)
    values[0, 0, :, PLANTED], values[1, 0, :, PLANTED] = 1.0, -3.0
    sums = sum_up(values)._replace(fired=torch.full((N_LATENTS,), N_IMAGES))
    first, *others = rank_amplified(sums, flat_spreads(), n_first=1000).first
    assert (first.latent, first.excess, first.is_significant) == (PLANTED, 2.0, True)
    assert not any(entry.is_significant or entry.z for entry in others)


def test_without_an_effect_few_are_called_significant():
    """Text attributions are all but 0, the probe's have mean 0: its sign is noise."""
    n_false, n_p_below = 0, 0.0
    for seed in range(40):
        values = draw(100 + seed, n_latents=30)
        values[0] *= 1e-3
        ranking = rank_amplified(sum_up(values), flat_spreads(), n_first=1000)
        n_false += ranking.n_significant > 0
        n_p_below += sum(entry.p < 0.05 for entry in ranking.first) / ranking.n_tested / 40
    # Any call is a false one here: at a level of 5 % in 2 of 40 draws, more than 7 in 1 of 1000.
    assert n_false <= 7
    assert 0.03 < n_p_below < 0.07


def test_benjamini_hochberg_equals_scipy():
    for seed, level in ((0, 0.05), (1, 0.2), (2, 0.5)):
        p = torch.rand(50, generator=seeded(seed), dtype=torch.float64) ** 3
        p[7] = p[8]
        expected = false_discovery_control(p.numpy()) <= level
        assert benjamini_hochberg(p, level).tolist() == expected.tolist()
        assert 0 < expected.sum() < 50
    assert benjamini_hochberg(torch.ones(0), 0.05).tolist() == []
    # Step up: the third passes, and takes the first two along.
    assert benjamini_hochberg(torch.tensor([0.04, 0.045, 0.049]), 0.05).all()


def test_unusable_settings_are_refused():
    sums = sum_up(draw())
    for level in (0.0, 1.0):
        with pytest.raises(ConfigError, match="level"):
            rank_amplified(sums, flat_spreads(), level=level)
    with pytest.raises(DataError, match="at least 5"):
        rank_amplified(sums._replace(n_images=4), flat_spreads())
    nobody = sums._replace(fired=torch.zeros(N_LATENTS, dtype=torch.int64))
    assert rank_amplified(nobody, flat_spreads()) == ([], 0, 0, 0)


def test_totals_of_tokens_count_an_image_once():
    """Latent 3 fires at both tokens of image 0 and at one of image 1; padding names latent 3."""
    indices = torch.tensor([[[3, 1], [3, 0]], [[2, 3], [3, 3]]])
    values = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[4.0, 0.0], [5.0, 0.0]]])
    totals = LatentTotals(n_scores=1, directions=torch.tensor([[1.0], [2.0], [1.0], [0.5]]))
    totals.update(SparseCodes(indices, values, 4))
    sums = totals.compute()
    assert sums.fired.tolist() == [0, 1, 1, 2]
    assert sums.energy.tolist() == [0.0, 16.0, 16.0, 0.25 * (1 + 9 + 25)]
    assert sums.n_images == 2

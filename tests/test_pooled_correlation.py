"""Correlation over all pairs: the value of scipy, and an interval that resamples whole images."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from clipattr.metrics.pooled_correlation import pooled_pearson, pooled_pearson_difference

N_IMAGES, N_SLOTS = 40, 6


def case():
    """Slots of an image share a shift, so that pairs of one image are alike."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(N_IMAGES, 1, generator=generator).double()
    noise = torch.randn(3, N_IMAGES, N_SLOTS, generator=generator).double()
    truth = 100 + shift + noise[0]
    mask = torch.rand(N_IMAGES, N_SLOTS, generator=generator) < 0.8
    return 3 * truth + noise[1], truth + 2 * noise[2], truth, mask


def options(resamples: int = 300):
    return {"resamples": resamples, "generator": torch.Generator().manual_seed(1)}


def test_correlation_of_all_pairs_is_that_of_scipy():
    one, other, truth, mask = case()
    for estimate in (one, other, -one):
        found = pooled_pearson(estimate, truth, mask, **options())
        assert found.mean == pytest.approx(pearsonr(estimate[mask], truth[mask])[0], abs=1e-12)
        assert found.low < found.mean < found.high
    difference = pooled_pearson_difference(one, other, truth, mask, **options())
    expected = pearsonr(one[mask], truth[mask])[0] - pearsonr(other[mask], truth[mask])[0]
    assert difference.mean == pytest.approx(expected, abs=1e-12)
    same = pooled_pearson_difference(one, one, truth, mask, **options())
    assert same == pytest.approx((0, 0, 0), abs=1e-12)


def test_without_a_correlation_there_is_no_number():
    one, other, truth, mask = case()
    nothing = torch.zeros_like(mask)
    for estimate, chosen in ((one, nothing), (torch.ones_like(one), mask)):
        assert np.isnan(pooled_pearson(estimate, truth, chosen, **options())).all()
        assert np.isnan(
            pooled_pearson_difference(estimate, other, truth, chosen, **options())
        ).all()
    # Slots of one image alone: many resamples have none of them.
    nothing[3] = True
    found = pooled_pearson(one, truth, nothing, **options())
    assert found.mean == pytest.approx(pearsonr(one[3], truth[3])[0])
    assert np.isnan(found[1:]).all()


def test_interval_is_that_of_a_plain_bootstrap_over_images():
    _, other, truth, mask = case()
    found = pooled_pearson(other, truth, mask, **options(4000))
    draw = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        images = torch.from_numpy(draw.integers(N_IMAGES, size=N_IMAGES))
        chosen = mask[images]
        drawn.append(np.corrcoef(other[images][chosen], truth[images][chosen])[0, 1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)

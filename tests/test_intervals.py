"""Bootstrap intervals: coverage, pairing, ratios of means, and refusal of undefined numbers."""

import numpy as np
import pytest
import torch

from clipattr.errors import DataError
from clipattr.metrics import intervals
from clipattr.metrics.intervals import (
    bootstrap_mean,
    bootstrap_positive_ratio,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    bootstrap_statistic,
    resampled_means,
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_interval_of_the_mean_agrees_with_the_normal_approximation(generator):
    values = torch.randn(2000, generator=generator, dtype=torch.float64) * 3 + 1
    interval = bootstrap_mean(values, resamples=2000, generator=generator)
    half = 1.96 * float(values.std()) / 2000**0.5
    assert interval.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.15 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.15 * half)


def test_the_interval_covers_the_truth_in_95_percent_of_the_trials(generator):
    """Ratio of means of skewed, dependent columns; the truth is 2.

    1000 trials have a standard error of 0.7 percent around the nominal 95.
    """
    covered = 0
    for _ in range(1000):
        below = -torch.rand(150, generator=generator, dtype=torch.float64).log() + 0.5
        above = below * (1 + 2 * torch.rand(150, generator=generator, dtype=torch.float64))
        interval = bootstrap_ratio(above, below, resamples=400, generator=generator)
        covered += interval.low <= 2 <= interval.high
    assert 0.92 <= covered / 1000 <= 0.98


def test_a_paired_interval_of_curves_covers_the_difference(generator):
    """Areas of two methods on the same images: what they share is most of their spread."""
    covered = 0
    for _ in range(1000):
        clean = 0.3 + 0.1 * torch.randn(100, generator=generator, dtype=torch.float64)
        noise = 0.05 * torch.randn(2, 100, generator=generator, dtype=torch.float64)
        ours, theirs = 0.5 * clean + noise[0], 0.6 * clean + noise[1]
        interval = bootstrap_ratio_difference(
            ours, theirs, clean, resamples=400, generator=generator
        )
        covered += interval.low <= -0.1 <= interval.high
    assert 0.92 <= covered / 1000 <= 0.98


def test_resampled_means_have_the_moments_of_a_bootstrap(generator):
    table = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    means = resampled_means(table, resamples=20000, generator=generator)
    expected = torch.cov(table.T, correction=0) / 50
    torch.testing.assert_close(means.mean(dim=0), table.mean(dim=0), rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(means.T), expected, rtol=0.06, atol=3e-4)


def test_resamples_equal_numpy_for_the_same_draws(monkeypatch):
    table = torch.randn(30, 3, dtype=torch.float64)
    picks = torch.randint(30, (40, 30), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(intervals, "_CHUNK_ENTRIES", 30 * 16)  # three chunks of 16, 16 and 8
    means = resampled_means(table, resamples=40, generator=torch.Generator().manual_seed(5))
    np.testing.assert_allclose(means.numpy(), table.numpy()[picks.numpy()].mean(axis=1), rtol=1e-10)


def test_ratio_is_one_of_means_not_a_mean_of_ratios(generator):
    interval = bootstrap_ratio(
        torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]), resamples=100, generator=generator
    )
    assert interval.mean == 0.5  # the mean of ratios would be 2 / 3
    assert interval.low == pytest.approx(1 / 3)
    assert interval.high == 1.0


def test_a_paired_difference_is_narrower_than_its_parts(generator):
    difficulty = torch.randn(300, generator=generator) * 5 + 20
    ours = difficulty - 1 + 0.1 * torch.randn(300, generator=generator)
    ones = torch.ones(300)
    arguments = {"resamples": 500, "generator": generator}
    paired = bootstrap_ratio_difference(ours, difficulty, ones, **arguments)
    single = bootstrap_ratio(ours, ones, **arguments)
    assert paired.low < -1 < paired.high < -0.9
    assert paired.high - paired.low < 0.1 * (single.high - single.low)


def test_any_function_of_means_can_be_asked_for(generator):
    values = torch.randn(500, generator=generator, dtype=torch.float64) * 2

    def deviation(mean: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return (square - mean**2).sqrt()

    interval = bootstrap_statistic(
        [values, values**2], deviation, resamples=300, generator=generator
    )
    assert interval.mean == pytest.approx(float(values.std(correction=0)))
    assert interval.low < interval.mean < interval.high


def test_same_seed_same_interval():
    values = torch.arange(20.0)
    first, again, other = (
        bootstrap_mean(values, resamples=50, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_undefined_numbers_are_refused_with_their_count(generator):
    values = torch.tensor([1.0, torch.nan, 2.0, torch.inf])
    with pytest.raises(DataError, match="2 of 4 images"):
        bootstrap_mean(values, resamples=10, generator=generator)
    with pytest.raises(DataError, match="1 images"):
        bootstrap_mean(values[:1], resamples=10, generator=generator)
    with pytest.raises(DataError, match="not finite in 10 of 10"):
        bootstrap_ratio(torch.ones(3), torch.zeros(3), resamples=10, generator=generator)


@pytest.mark.parametrize(("shift", "is_defined"), [(2, (1, 1)), (0, (1, 0)), (-2, (0, 0))])
def test_a_ratio_to_what_is_not_positive_is_not_defined(shift: int, is_defined: tuple[int, int]):
    """Where a resample alone is not positive, the ratio is defined and its interval is not."""
    below = torch.linspace(-0.9, 1, 21).double() + shift
    above = below.square()
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    found = bootstrap_positive_ratio(above, below, resamples=50, generator=draws[0])
    expected = bootstrap_ratio(above, below, resamples=50, generator=draws[1])
    known = [expected.mean, *expected[1:]]
    defined = [is_defined[0], is_defined[1], is_defined[1]]
    known = [value if is_it else torch.nan for value, is_it in zip(known, defined, strict=True)]
    assert list(found) == pytest.approx(known, nan_ok=True)

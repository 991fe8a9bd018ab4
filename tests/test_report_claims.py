"""Captions of the plots: each follows from the numbers, whichever way they fall."""

import dataclasses
import math
import re

import pytest

from clipattr.metrics.intervals import Interval
from clipattr.report import ScatterResult, claims
from clipattr.report.attribution_charts import scatter_chart
from clipattr.report.charts import curves_chart, rank_chart
from tests.page_content import COLUMNS, full_content, method

ABOVE, BELOW = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1)
AROUND = Interval(0.2, -0.1, 0.3)
UNDEFINED = Interval(math.nan, math.nan, math.nan)
MORE_IS_WORSE = ("deletion_auc", "global_deletion")


def compared(difference):
    """Both methods, every column with the same difference."""
    subject = dataclasses.replace(
        method("attribution_patching", "Attribution patching", 0.2),
        minus_logit_lens=dict.fromkeys(COLUMNS, difference),
    )
    return [subject, method("logit_lens", "Logit lens", 0.3)]


@pytest.mark.parametrize(
    ("interval", "expected"), [(ABOVE, 1), (BELOW, -1), (AROUND, 0), (UNDEFINED, 0)]
)
def test_direction_needs_an_interval_without_zero(interval, expected):
    assert claims.direction(interval) == expected


@pytest.mark.parametrize("column", COLUMNS)
def test_method_claim_falls_either_way(column):
    better, worse = (BELOW, ABOVE) if column in MORE_IS_WORSE else (ABOVE, BELOW)
    positive = ("faster", "more with", "more of")
    negative = ("slowly", "less with", "fewer of")
    said = claims.method_claim(compared(better), column)
    assert any(word in said for word in positive)
    assert not any(word in said for word in negative)
    said = claims.method_claim(compared(worse), column)
    assert any(word in said for word in negative)
    for unclear in (AROUND, UNDEFINED):
        said = claims.method_claim(compared(unclear), column)
        assert "no difference between attribution patching and logit lens is shown" in said
        assert not any(word in said for word in (*positive, *negative))
    assert "+0.200 [\N{MINUS SIGN}0.100, 0.300]" in claims.method_claim(compared(AROUND), column)


def test_without_attribution_patching_nothing_is_claimed():
    lens = compared(ABOVE)[1:]
    assert claims.method_claim(lens, "deletion_auc") == claims.NOT_COMPARED
    assert claims.control_claim(lens, lens, "deletion_auc") == claims.NOT_COMPARED


@pytest.mark.parametrize("column", ["deletion_auc", "insertion_auc"])
def test_control_claim_speaks_of_each_dictionary(column):
    better, worse = (BELOW, ABOVE) if column == "deletion_auc" else (ABOVE, BELOW)
    words = {better: "leads", worse: "trails", AROUND: "is not clearly different from"}
    for trained, first in words.items():
        for untrained, second in words.items():
            said = claims.control_claim(compared(trained), compared(untrained), column)
            assert f"patching {first} logit lens with the trained" in said
            assert f"and {second} it with the untrained" in said


def test_class_claim_is_a_count():
    first, second = full_content().classes
    undefined = dataclasses.replace(first, spearman_exact=math.nan)
    worse = dataclasses.replace(first, spearman_exact=-0.1)
    said = claims.class_claim([first, second, worse, undefined], "spearman_exact")
    assert "agrees more with exact patching than logit lens in 2 of 3" in said
    assert "in 1 of 2" in claims.class_claim([first, second], "deletion_auc")
    assert "without intervals" in said


@pytest.mark.parametrize(
    ("gain", "words"), [(ABOVE, " raise "), (BELOW, " lower "), (AROUND, "do not change")]
)
def test_gain_claim_follows_the_interval(gain, words):
    corrections = full_content().corrections
    assert corrections is not None
    assert words in claims.gain_claim(dataclasses.replace(corrections, gain=gain))
    assert "along the embedding 91.4\N{NO-BREAK SPACE}%" in claims.size_claim(corrections)


@pytest.mark.parametrize(
    ("difference", "words"),
    [(ABOVE, "the first one"), (BELOW, "the second one"), (AROUND, "do not clearly differ")],
)
def test_exact_claim_follows_the_interval(difference, words):
    result = full_content().against_exact
    assert result is not None
    said = claims.exact_claim(dataclasses.replace(result, difference=difference))
    assert words in said
    assert "Over all 1,234 pairs One (0.800) and Two (0.600)" in said


def test_rank_claim_counts_learned_effects_alone():
    good, not_learned = full_content().scorecard
    far = dataclasses.replace(good, rank_attribution=400, mean_attribution=BELOW)
    said = claims.rank_claim([good, far, not_learned])
    assert "Of the 2 latents of learned effects, attribution patching has 1" in said
    assert "logit lens 0" in said
    assert "Of these latents 1 lower the prompt's score" in said
    assert "lower" not in claims.rank_claim([good, not_learned])
    assert claims.rank_claim([not_learned]).startswith("None of the planted effects")


def test_band_is_1_96_standard_errors_around_the_curve():
    one = dataclasses.replace(
        method("attribution_patching", "One", 0.2),
        deletion_curve=[0.4, 0.3, 0.2],
        deletion_error=[0.0, 0.01, 0.05],
    )
    svg = curves_chart([one], "deletion")
    line = re.search(r'd="([^"]*)"[^>]*stroke: var\(--attribution-patching\)', svg)
    band = re.search(
        r'FillBetweenPolyCollection.*? d="([^"]*)".*?<use [^>]* y="([^"]*)"', svg, re.S
    )
    assert line is not None
    assert band is not None
    curve, corners = (read_points(found.group(1)) for found in (line, band))
    per_score = (curve[2][1] - curve[0][1]) / -0.2
    for step, error in enumerate(one.deletion_error):
        place, height = curve[step]
        ends = [y + float(band.group(2)) for x, y in corners if x == pytest.approx(place, abs=0.02)]
        half = 1.96 * error * abs(per_score)
        assert max(ends) == pytest.approx(height + half, abs=0.05)
        assert min(ends) == pytest.approx(height - half, abs=0.05)


def read_points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)]


def test_scatter_draws_every_pair_where_it_is():
    result = full_content().against_exact
    assert result is not None
    exact, estimate = [0.0, 0.1, 0.3, 0.1], [0.05, 0.2, -0.1, 0.2]
    # So many that matplotlib would simplify a path.
    exact += [0.001 * number for number in range(200)]
    estimate += [0.1 + 0.0001 * number for number in range(200)]
    scatter = ScatterResult("attribution_patching", "One", exact, estimate, ABOVE)
    svg = scatter_chart(dataclasses.replace(result, scatters=[scatter]), 0)
    path = re.search(r'd="([^"]*)"[^>]*opacity: 0.7[^>]*stroke: var\(--attribution-patching\)', svg)
    assert path is not None
    dots = [(float(x), float(y)) for x, y in re.findall(r"M ([\d.]+) ([\d.]+)", path.group(1))]
    assert len(dots) == len(exact)
    for axis, values in enumerate((exact, estimate)):
        unit = (dots[2][axis] - dots[0][axis]) / (values[2] - values[0])
        for dot, value in zip(dots, values, strict=True):
            assert dot[axis] - dots[0][axis] == pytest.approx(unit * (value - values[0]), abs=0.05)


def test_rank_chart_mutes_what_was_not_learned():
    learned, not_learned = full_content().scorecard
    assert "var(--logit-lens)" in rank_chart([learned])
    assert "var(--logit-lens)" not in rank_chart([not_learned])
    assert "Place *" in rank_chart([not_learned])

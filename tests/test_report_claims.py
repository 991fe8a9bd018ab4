"""Captions of the plots: each follows from the numbers, whichever way they fall."""

import dataclasses
import math
import random
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
    said = claims.method_claim(compared(AROUND), column)
    assert "no difference between attribution patching and logit lens is shown" in said
    assert not any(word in said for word in (*positive, *negative))
    for unknown in (UNDEFINED, Interval(0.2, math.nan, math.nan)):
        said = claims.method_claim(compared(unknown), column)
        assert said.endswith(" not defined in this run.")
        assert not any(word in said for word in (*positive, *negative, "no difference", "["))
    assert "+0.200 [\N{MINUS SIGN}0.100, 0.300]" in claims.method_claim(compared(AROUND), column)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("deletion_auc", "slowly than logit lens over 4 deleted latents (+0.2"),
        ("insertion_auc", "faster than logit lens over 3 inserted latents (+0.2"),
        ("global_deletion", "slowly than logit lens over 4 deleted latents (+0.2"),
        ("overlap_exact", "finds more of the true ones than logit lens (+0.2"),
    ],
)
def test_areas_say_over_how_many_latents(column, words):
    assert words in claims.method_claim(compared(ABOVE), column)


@pytest.mark.parametrize("column", ["spearman_exact", "pearson_exact"])
def test_less_agreement_is_with_exact_patching(column):
    said = claims.method_claim(compared(BELOW), column)
    assert "attribution patching agrees less with exact patching than logit lens (" in said


def test_digits_show_on_which_side_of_zero_an_interval_lies():
    said = claims.method_claim(compared(Interval(-0.0004, -0.0006, -0.0002)), "deletion_auc")
    minus = "\N{MINUS SIGN}"
    assert f"faster than logit lens over 4 deleted latents ({minus}0.0004 [" in said
    assert f"[{minus}0.0006, {minus}0.0002])" in said
    found = claims.described(Interval(0.0004, -0.0002, 0.0006))
    assert found == "0.000 [0.000, 0.001]"


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
    said = claims.control_claim(compared(better), compared(UNDEFINED), column)
    assert "cannot be compared with it with the untrained one (not defined in this run)" in said
    assert "not clearly" not in said


def test_class_claim_is_a_count():
    first, second = full_content().classes
    undefined = dataclasses.replace(first, spearman_exact=math.nan)
    worse = dataclasses.replace(first, spearman_exact=-0.1)
    said = claims.class_claim([first, second, worse, undefined], "spearman_exact")
    assert "agrees more with exact patching than logit lens in 2 of 3" in said
    assert "in 1 of 2" in claims.class_claim([first, second], "deletion_auc")
    assert "without intervals" in said
    said = claims.class_claim([undefined], "spearman_exact")
    assert said.endswith("minus logit lens is not defined in this run.")


@pytest.mark.parametrize(
    ("gain", "words"), [(ABOVE, " raise "), (BELOW, " lower "), (AROUND, "do not change")]
)
def test_gain_claim_follows_the_interval(gain, words):
    corrections = full_content().corrections
    assert corrections is not None
    assert words in claims.gain_claim(dataclasses.replace(corrections, gain=gain))
    undefined = dataclasses.replace(
        corrections, gain=UNDEFINED, sizes=dict.fromkeys(corrections.sizes, UNDEFINED)
    )
    for claim in (claims.gain_claim, claims.size_claim):
        assert claim(undefined).endswith(" is not defined in this run.")
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
    said = claims.exact_claim(dataclasses.replace(result, difference=UNDEFINED))
    assert "cannot be compared: their difference is not defined in this run." in said


def test_rank_claim_counts_learned_effects_alone():
    good, not_learned = full_content().scorecard
    far = dataclasses.replace(good, rank_attribution=400, mean_attribution=BELOW)
    said = claims.rank_claim([good, far, not_learned])
    assert "Of the 1 latents of learned effects that do not lower the prompt's score" in said
    assert "attribution patching has 1 among its first 10, logit lens 0." in said
    assert said.endswith("Another 1 lower it on average, and belong near the end.")
    # A latent that lowers the score is no hit, however early a method has it.
    early = dataclasses.replace(far, rank_logit_lens=1)
    assert "logit lens 0." in claims.rank_claim([good, early])
    said = claims.rank_claim([good, not_learned])
    assert said.startswith("Of the 1 latents of learned effects, attribution patching has 1")
    assert "lower" not in said
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
    # So many that matplotlib would simplify a path, and as many as the page has.
    draw = random.Random(0)
    exact += [draw.uniform(-0.2, 0.3) for _ in range(746)]
    estimate += [draw.uniform(-0.2, 0.3) for _ in range(746)]
    scatter = ScatterResult("attribution_patching", "One", exact, estimate, ABOVE)
    svg = scatter_chart(dataclasses.replace(result, scatters=[scatter]), 0)
    path = re.search(r'd="([^"]*)"[^>]*opacity: 0.7[^>]*stroke: var\(--attribution-patching\)', svg)
    assert path is not None
    # What is drawn of a dot is the line without length: a place that is only gone to has no ink.
    dots = read_points(path.group(1))[::2]
    assert len(dots) == len(exact) == 750
    lines = [f"M {x:.2f} {y:.2f} L {x:.2f} {y:.2f}" for x, y in dots]
    assert path.group(1).split() == " ".join(lines).split()
    for axis, values in enumerate((exact, estimate)):
        unit = (dots[2][axis] - dots[0][axis]) / (values[2] - values[0])
        for dot, value in zip(dots, values, strict=True):
            assert dot[axis] - dots[0][axis] == pytest.approx(unit * (value - values[0]), abs=0.05)


def test_rank_chart_mutes_what_was_not_learned():
    learned, not_learned = full_content().scorecard
    assert "var(--logit-lens)" in rank_chart([learned])
    assert "var(--logit-lens)" not in rank_chart([not_learned])
    assert "Place *" in rank_chart([not_learned])
    assert "(lowers)" not in rank_chart([learned, not_learned])
    lowering = dataclasses.replace(learned, mean_attribution=BELOW)
    assert "Two (lowers)" in rank_chart([lowering])


@pytest.mark.parametrize("value", [math.nan, 0.2])
def test_scatter_of_equal_or_undefined_estimates_is_drawn(value):
    result = full_content().against_exact
    assert result is not None
    scatter = ScatterResult("exact", "One", [0.2, 0.2], [value, value], UNDEFINED)
    assert "nan" not in scatter_chart(dataclasses.replace(result, scatters=[scatter]), 0)

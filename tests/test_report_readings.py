"""Words and number formats of the page: each sentence has a form for each way the numbers fall."""

import dataclasses
import math

import pytest

from clipattr.metrics.intervals import Interval
from clipattr.report import (
    CueResult,
    GroupRow,
    MethodResult,
    ScorecardRow,
    UnexpectedResult,
    formatting,
    readings,
)

NAN_INTERVAL = Interval(math.nan, math.nan, math.nan)


def interval(mean: float) -> Interval:
    return Interval(mean, mean - 0.01, mean + 0.01)


def method(name: str, start: float) -> MethodResult:
    steps = [interval(start + 0.1 * step) for step in range(6)]
    return MethodResult(name, name, [], [], [], [], *steps, minus_logit_lens={})


def test_verdict_follows_the_ranks():
    row = ScorecardRow(
        *("a", "b", "c", "d", "e", 41, 0.9, 2, 17, 256, True), interval(0.2), 0.3, 0.9, []
    )
    assert readings.verdict(row).startswith("Attribution patching ranks")
    assert readings.verdict(row).endswith("2 against 17.")
    other = dataclasses.replace(row, rank_attribution=30)
    assert readings.verdict(other).startswith("Logit lens ranks")
    equal = dataclasses.replace(row, rank_attribution=17)
    assert readings.verdict(equal) == "Both methods put the responsible latent at rank 17."
    missing = dataclasses.replace(row, learned=False)
    assert "did not learn" in readings.verdict(missing)
    assert "raises" in readings.use_reading(row)
    lowered = dataclasses.replace(row, mean_attribution=interval(-0.2))
    assert readings.use_reading(lowered).endswith("the latent lowers the prompt's score.")
    unclear = dataclasses.replace(row, mean_attribution=interval(0.005))
    assert "neither clearly raises nor lowers" in readings.use_reading(unclear)
    tally = readings.tally([row, other, other, equal, missing])
    assert tally.startswith("The model learned 4 of 5 planted effects.")
    assert "better in 1, logit lens in 2, and both equally in 1." in tally
    assert "lowers" not in tally


def test_a_latent_that_lowers_the_score_belongs_near_the_end():
    raising = ScorecardRow(
        *("a", "b", "c", "d", "e", 41, 0.9, 2, 17, 512, True), interval(0.2), 0.3, 0.9, []
    )
    lowering = dataclasses.replace(
        raising, rank_attribution=505, rank_logit_lens=318, mean_attribution=interval(-0.2)
    )
    assert readings.verdict(lowering) == (
        "A latent that lowers the score belongs near the end: attribution patching has it at "
        "rank 505, logit lens at 318 of 512."
    )
    tally = readings.tally([raising, lowering, lowering])
    assert "the 2 whose" not in tally
    assert "Among the 1 whose latent does not lower the score" in tally
    assert "better in 1, logit lens in 0, and both equally in 0." in tally
    assert "In 2 the responsible latent lowers the prompt's score" in tally
    assert tally.endswith("attribution patching has it nearer to it in 2, logit lens in 0.")
    alone = readings.tally([dataclasses.replace(lowering, rank_logit_lens=511)])
    assert "Among" not in alone
    assert alone.endswith("nearer to it in 0, logit lens in 1.")
    unknown = dataclasses.replace(raising, mean_attribution=NAN_INTERVAL)
    assert readings.use_reading(unknown).endswith("score is not defined in this run.")
    assert readings.verdict(unknown).startswith("Attribution patching ranks")


def test_best_methods_leave_the_reference_out_and_share_ties():
    exact = method("exact", 0.0)
    good = method("attribution_patching", 0.1)
    tied = dataclasses.replace(
        method("integrated_gradients", 0.1), deletion_auc=Interval(0.1004, 0.0, 1.0)
    )
    poor = method("logit_lens", 0.3)
    best = readings.best_methods([exact, good, tied, poor])
    assert best["deletion_auc"] == {"attribution_patching", "integrated_gradients"}
    assert best["insertion_auc"] == best["spearman_exact"] == {"logit_lens"}
    assert best["global_deletion"] == {"attribution_patching", "integrated_gradients"}


def test_worst_group_is_found_per_head():
    rows = [
        GroupRow("text", "a", 9, interval(0.9)),
        GroupRow("text", "b", 9, interval(0.8)),
        GroupRow("text", "empty", 0, NAN_INTERVAL),
        GroupRow("probe", "a", 9, interval(0.6)),
        GroupRow("probe", "b", 9, interval(0.7)),
    ]
    assert readings.worst_groups(rows) == {("text", "b"), ("probe", "a")}


@pytest.mark.parametrize(
    ("amplification", "words"),
    [
        (Interval(2.0, 1.1, 3.0), "above 1"),
        (Interval(0.5, 0.1, 0.9), "below 1"),
        (Interval(1.2, 0.9, 3.0), "includes 1"),
        (Interval(math.inf, 2.0, 3.0), "not defined"),
    ],
)
def test_amplification_reading_follows_the_interval(amplification, words):
    cue = CueResult("cue", True, interval(0.3), interval(0.6), amplification, 0.1, 0.2, [])
    assert words in readings.amplification_reading(cue)


def test_the_list_of_the_atlas_in_words():
    found = UnexpectedResult([], 0.15, 0.8, 0.05, 0.6, ["a", "b"], ["a"], 20, 77, 1.5)
    text = readings.unexpected_reading(found)
    for part in (
        "1 of the 2 kinds",
        "first 20",
        "recall 80 %",
        "precision 15 %",
        "60 %",
        "77",
        "1.5",
    ):
        assert part in text
    nothing = dataclasses.replace(found, kinds_learned=[], kinds_found=[])
    assert "learned no planted failure" in readings.unexpected_reading(nothing)


def test_formatting_of_edges():
    assert formatting.number(-0.0004) == "0.000"
    assert formatting.number(-0.0006) == "\N{MINUS SIGN}0.001"
    assert formatting.signed(0.0) == "0.000"
    assert formatting.signed(0.25, 2) == "+0.25"
    assert formatting.percent(math.nan) == "not defined"
    assert formatting.log_position(1, 256) == 0
    assert formatting.log_position(16, 256) == pytest.approx(50)
    assert formatting.log_position(1, 1) == 0
    assert formatting.bar_length(-0.2, 0.4) == -25
    assert formatting.bar_length(0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("found", "reference", "digits"),
    [
        (Interval(-0.0004, -0.0006, -0.0002), 0.0, 4),
        (Interval(-0.0006, -0.0008, -0.00002), 0.0, 5),
        (Interval(0.0, -0.0002, 0.0002), 0.0, 3),  # nothing is claimed of it
        (Interval(0.2, 0.1, 0.3), 0.0, 3),
        (Interval(0.2, 0.0, 0.3), 0.0, 3),
        (Interval(1.5, 1.0004, 2.0), 1.0, 4),
        (NAN_INTERVAL, 0.0, 3),
    ],
)
def test_digits_keep_an_interval_on_its_side(found, reference, digits):
    assert formatting.digits_of(found, reference=reference) == digits

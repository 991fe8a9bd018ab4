"""Sentences of the page of shortcuts: each follows from the numbers, whichever way they fall."""

import dataclasses

import pytest

from clipattr.metrics.intervals import Interval
from clipattr.report.shortcuts import chance, claims, readings
from clipattr.report.shortcuts.page import render
from tests.shortcuts_content import (
    NAN,
    SCORE,
    UNDEFINED,
    effect,
    full_content,
    latent,
    quality,
    tag,
)

MINUS = "\N{MINUS SIGN}"
ABOVE, AROUND, BELOW = Interval(0.5, 0.2, 0.8), Interval(0.1, -0.2, 0.3), Interval(-0.5, -0.8, -0.2)
RATIO, AGAINST = Interval(3.0, 2.0, 4.5), Interval(-3.0, -4.5, -2.0)


def claim(*, text=ABOVE, probe=ABOVE, ratio=RATIO, excess=ABOVE):
    row = dataclasses.replace(
        effect("pairs", 0.1, 0.2), text=text, probe=probe, amplification=ratio, excess=excess
    )
    return claims.amplification_claim(dataclasses.replace(tag(), effects=[row]))


@pytest.mark.parametrize(
    ("excess", "words"),
    [
        (ABOVE, "tag\N{RIGHT DOUBLE QUOTATION MARK} 3.00 times [2.00, 4.50] as much as the prompt"),
        (AROUND, "is not shown: it does 3.00 times [2.00, 4.50] as much."),
        (BELOW, "less than the prompt does: 3.00 times [2.00, 4.50] as much."),
    ],
)
def test_a_ratio_is_said_with_what_the_excess_shows(excess, words):
    assert words in claim(excess=excess)


@pytest.mark.parametrize(
    ("excess", "words"),
    [
        (ABOVE, "and more strongly: 3.00 times [2.00, 4.50] as much."),
        (AROUND, "it is not shown that it does so more strongly: 3.00 times"),
        (BELOW, "and less strongly: 3.00 times"),
    ],
)
def test_a_negative_ratio_is_opposition(excess, words):
    said = claim(ratio=AGAINST, probe=BELOW, excess=excess)
    assert "in the direction opposite to the prompt's" in said
    assert words in said
    assert MINUS not in said


@pytest.mark.parametrize(
    ("text", "probe", "excess", "words"),
    [
        (
            AROUND,
            ABOVE,
            ABOVE,
            "leans on {} more than the prompt does (probe +0.500 [0.200,",
        ),
        (AROUND, AROUND, ABOVE, "Neither the probe nor the prompt reacts to {} beyond chance"),
        (ABOVE, AROUND, BELOW, "leans on {} less than the prompt does"),
        (AROUND, AROUND, BELOW, "Neither the probe nor the prompt reacts to {} beyond chance"),
        (AROUND, BELOW, AROUND, "reacts to {}, but that it does so more than the prompt is not"),
        (ABOVE, AROUND, AROUND, "does not react to {} beyond chance"),
        (AROUND, AROUND, AROUND, "Neither the probe nor the prompt reacts to {} beyond chance"),
    ],
)
def test_without_a_ratio_the_excess_speaks(text, probe, excess, words):
    said = claim(text=text, probe=probe, ratio=UNDEFINED, excess=excess)
    assert words.format(claims.quoted("tag")) in said
    assert " times" not in said
    blames_the_prompt = "because the prompt does not react beyond chance" in said
    assert blames_the_prompt == (text is AROUND and not said.startswith("Neither"))


def test_what_is_not_defined_is_not_claimed():
    for change in ("text", "probe", "excess"):
        said = claim(**{change: UNDEFINED})
        assert said.endswith("more than the prompt does is not defined in this run.")
    half = Interval(3.0, NAN, NAN)
    assert " times" not in claim(ratio=half)


def test_without_an_effect_the_groups_speak():
    cue = dataclasses.replace(tag(), effects=[])
    said = claims.amplification_claim(cue)
    assert "was not measured" in said
    assert "prompts: 56.2 % of the worst group" in said.replace("\N{NO-BREAK SPACE}", " ")
    assert "probe: 65.7 % of the worst group" in said.replace("\N{NO-BREAK SPACE}", " ")
    bare = dataclasses.replace(cue, quality=[])
    assert claims.amplification_claim(bare).startswith("No effect of")


def test_large_and_close_ratios_have_the_digits_they_need():
    assert "14.4 times [12.3, 18.1]" in claim(ratio=Interval(14.41, 12.31, 18.14))
    assert "2.410 times [1.001, 3.123]" in claim(ratio=Interval(2.41, 1.001, 3.123))


def test_headline_is_of_the_first_measure_and_the_largest_excess():
    rows = [
        effect("placebo", 0.1, 9.0, placebo=True),
        dataclasses.replace(effect("pairs", 0.1, 0.9, score="three"), excess=UNDEFINED),
        effect("pairs", 0.1, 0.4, score="one"),
        effect("pairs", 0.1, -0.7, score="two"),
        effect("removal", 0.1, 5.0, score="one"),
    ]
    cue = dataclasses.replace(tag(), effects=rows)
    assert claims.headline_effect(cue) is rows[3]
    few = [dataclasses.replace(row, excess=UNDEFINED) for row in rows[1:4]]
    assert claims.headline_effect(dataclasses.replace(cue, effects=[*few, rows[4]])) is rows[4]
    assert claims.headline_effect(dataclasses.replace(cue, effects=few)) is few[0]
    assert claims.choice_note(cue).startswith("Measured by: pairs; score: two, the one with")
    assert "of 3, so the numbers flatter" in claims.choice_note(cue)
    assert "for all 3 at once (+0.600 [0.550, 0.660])." in claims.choice_note(cue)
    over_all = dataclasses.replace(rows[3], excess_all=Interval(0.6, -0.1, 1.3))
    cue = dataclasses.replace(tag(), effects=[*rows[1:3], over_all])
    assert "for all 3 at once (+0.600 [\N{MINUS SIGN}0.100, 1.300])." in claims.choice_note(cue)
    assert "is not shown" in claims.amplification_claim(cue)
    assert claims.choice_note(tag()) == f"Measured by: pairs; score: {SCORE}."


@pytest.mark.parametrize(
    ("effect_of_placebo", "words"),
    [
        (UNDEFINED, "its effect on the probe is not defined in this run."),
        (AROUND, "it does not move the probe beyond chance (+0.100"),
        (Interval(-0.5, -0.6, -0.4), "it moves the probe too ("),
        (Interval(0.01, 0.005, 0.02), "by less than 1\N{NO-BREAK SPACE}% of what the cue does."),
        (Interval(3.0, 2.0, 4.0), "so the effect is not the cue's own."),
    ],
)
def test_placebos_are_judged_beside_the_cue(effect_of_placebo, words):
    cue = tag()
    placebo = dataclasses.replace(cue.effects[1], probe=effect_of_placebo)
    other = dataclasses.replace(placebo, score="another score")
    cue = dataclasses.replace(cue, effects=[cue.effects[0], placebo, other])
    (said,) = claims.placebo_claims(cue)
    assert said.startswith("Control (placebo of the pairs): ")
    assert words in said
    if effect_of_placebo.mean == -0.5:
        assert "by 30\N{NO-BREAK SPACE}% of what the cue does." in said
    unknown = dataclasses.replace(cue.effects[0], probe=UNDEFINED)
    still = dataclasses.replace(cue.effects[0], probe=AROUND)
    unnamed = dataclasses.replace(placebo, measure="noise")
    for effects in ([unknown, placebo], [still, placebo], [cue.effects[0], unnamed]):
        (said,) = claims.placebo_claims(dataclasses.replace(cue, effects=effects))
        assert "the cue" not in said


@pytest.mark.parametrize(
    ("excess", "words"),
    [
        (UNDEFINED, "whether the probe leans on such latents more is not defined in this run."),
        (Interval(-0.02, -0.03, -0.01), "the probe leans less on such latents than the prompt ("),
        (Interval(0.02, -0.03, 0.05), "more than the prompt does is not shown (excess +0.020"),
        (Interval(0.2, 0.1, 0.3), "by 50\N{NO-BREAK SPACE}% of the excess of the cue's."),
        (Interval(0.5, 0.1, 0.9), "so the excess is not the cue's own."),
    ],
)
def test_a_placebo_of_a_removal_is_judged_by_the_excess(excess, words):
    """Beside its own measure, and not by what it does to the probe: latents may matter to both."""
    removal = dataclasses.replace(effect("removal", 0.1, 0.4), excess=Interval(0.4, 0.3, 0.5))
    placebo = effect("placebo of the removal", 0.1, 0.2, placebo=True)
    placebo = dataclasses.replace(placebo, probe=Interval(-9.0, -9.1, -8.9), excess=excess)
    cue = dataclasses.replace(tag(), effects=[tag().effects[0], removal, placebo])
    (said,) = claims.placebo_claims(cue)
    assert said.startswith("Control (placebo of the removal): ")
    assert said.endswith(words) or words in said and not words.endswith(".")
    unknown = dataclasses.replace(removal, excess=UNDEFINED)
    alone = dataclasses.replace(cue, effects=[tag().effects[0], unknown, placebo])
    assert "cue's" not in claims.placebo_claims(alone)[0]


@pytest.mark.parametrize(
    ("cue_excess", "end"),
    [
        (Interval(-0.15, -0.2, -0.1), "0.060]), though not on the cue's."),
        (Interval(0.05, -0.1, 0.2), "0.060]), which is not shown of the cue's."),
        (Interval(0.02, 0.01, 0.03), "so the excess is not the cue's own."),
    ],
)
def test_an_excess_that_the_cue_lacks_is_not_shared_with_its_placebo(cue_excess, end):
    removal = dataclasses.replace(effect("removal", 0.3, 0.2), excess=cue_excess)
    placebo = effect("placebo of the removal", 0.1, 0.2, placebo=True)
    placebo = dataclasses.replace(placebo, excess=Interval(0.04, 0.02, 0.06))
    (said,) = claims.placebo_claims(dataclasses.replace(tag(), effects=[removal, placebo]))
    assert said.endswith(end)
    is_shared = cue_excess.low > 0
    assert ("the prompt does too (excess" in said) == is_shared
    assert ("at least as much" in said) == is_shared


def beside_chance(*, n=100, share=0.01, excess=ABOVE, scores=("one",), draws=None):
    """`draws`: how many, and how many of them are as large."""
    rows = [
        dataclasses.replace(
            effect("pairs", 0.1, 0.5, score=score),
            probe=ABOVE,
            excess=excess,
            null_high=0.4,
            null_share=share,
            n_null=n,
        )
        for score in scores
    ]
    if draws is not None:
        placebo = effect(claims.PLACEBO_REMOVAL, 0.1, 0.1, score="one", placebo=True)
        share = draws[1] / draws[0]
        rows.append(dataclasses.replace(placebo, null_high=0.2, null_share=share, n_null=draws[0]))
    cue = dataclasses.replace(tag(), effects=rows)
    return chance.chance_claims(cue), [
        chance.chance_note(row).replace("\u00a0", " ") for row in rows
    ]


def test_chance_is_counted_in_probes():
    (said,), (note,) = beside_chance()
    assert said.replace("\u00a0", " ") == (
        "Chance does not explain how strongly the probe reacts: 95 % of 100 probes trained on "
        "shuffled labels react by less than 0.400 standard deviations, and none reacts as "
        "strongly as the probe."
    )
    assert note == "95 % below 0.400; 0 of 100 as large"
    (said,), _ = beside_chance(n=1000, share=3 / 1001)
    assert "95\u00a0% of 1,000 probes" in said
    assert said.endswith("and 2 react as strongly as the probe.")
    (said,), (note,) = beside_chance(share=90 / 101)
    assert said == (
        "That alone does not show that the labels taught it: of 100 probes trained on shuffled "
        f"labels 89 react to {claims.quoted('tag')} as strongly."
    )
    assert note == "95 % below 0.400; 89 of 100 as large"


@pytest.mark.parametrize("excess", [AROUND, BELOW])
def test_without_an_excess_chance_is_a_comparison(excess):
    (said,), _ = beside_chance(share=90 / 101, excess=excess)
    assert said.startswith("For comparison: of 100 probes trained on shuffled labels 89 react to")


def test_few_probes_claim_nothing():
    """None of 19 is a chance of one in twenty; one of 20 is less."""
    assert beside_chance(n=19, share=1 / 20) == ([], ["0 of 19 as large"])
    (said,), _ = beside_chance(n=20, share=1 / 21)
    assert said.startswith("Chance does not explain")
    assert beside_chance(n=0) == ([], ["not defined"])


def test_among_scores_every_probe_has_its_own_headline():
    (said,), _ = beside_chance(scores=("one", "two"))
    assert "0.400 standard deviations, each on the score of its largest excess, and none" in said
    (said,), _ = beside_chance(scores=("one", "two"), share=90 / 101)
    assert said.endswith("as strongly, each on the score of its largest excess.")


@pytest.mark.parametrize(
    ("draws", "words"),
    [
        ((30, 3), "Of 30 draws of other latents, 3 move the probe at least as much as the cue's"),
        ((30, 1), "Of 30 draws of other latents, 1 moves the probe"),
        ((1, 0), "Of 1 draw of other latents, none moves the probe"),
    ],
)
def test_draws_of_latents_are_counted(draws, words):
    (_, said), (_, note) = beside_chance(draws=draws)
    assert said.startswith(words)
    assert note.endswith(
        f"{draws[1]} of {draws[0]} as large as the cue\N{RIGHT SINGLE QUOTATION MARK}s"
    )


def test_a_missing_placebo_is_said():
    cue = dataclasses.replace(tag(), effects=tag().effects[:1])
    (said,) = claims.placebo_claims(cue)
    assert said.startswith("No placebo was measured")
    assert claims.placebo_claims(dataclasses.replace(cue, effects=[])) == []


def test_latents_found_without_a_cue():
    content = full_content()
    said = claims.amplified_claim(content)
    assert said.startswith("With no cue named, 17 pairs of a latent and a score are used more")
    assert "than by the prompt, by attribution (" in said
    assert "taken out exactly" not in said
    assert "false discovery rate of 5\N{NO-BREAK SPACE}%" in said
    assert (
        f"latent 275, of {claims.quoted('tag')}; taking it out confirms it (excess +0.850" in said
    )
    weak = dataclasses.replace(latent(1, 9, significant=True, cues=[]), excess=AROUND)
    said = claims.amplified_claim(
        dataclasses.replace(content, amplified=[latent(1, 8, significant=False, cues=[]), weak])
    )
    assert "latent 9, of no cue that was named; taking it out does not confirm it" in said
    strong = latent(1, 8, significant=True, cues=[])
    for rows, words in (
        ([strong, weak], "5\N{NO-BREAK SPACE}%); of the 2 taken out exactly, 1 is confirmed. The"),
        ([strong, weak, strong], "of the 3 taken out exactly, 2 are confirmed."),
        ([weak, weak], "of the 2 taken out exactly, none is confirmed."),
    ):
        assert words in claims.amplified_claim(dataclasses.replace(content, amplified=rows))
    one = dataclasses.replace(content, amplified=[], n_significant=1)
    assert "1 pair of a latent and a score is used more" in claims.amplified_claim(one)
    assert "strongest" not in claims.amplified_claim(one)
    none = dataclasses.replace(content, n_significant=0)
    assert "no latent is used more" in claims.amplified_claim(none)
    assert "275" not in claims.amplified_claim(none)
    assert "not ranked" in claims.amplified_claim(dataclasses.replace(content, amplified=None))


def test_harm_is_said_of_each_head():
    text, probe = readings.harm_claims(tag())
    assert text == (
        f"The text head is worst on {claims.quoted('cracked')} without the cue: "
        "77.4\N{NO-BREAK SPACE}%, with 81.2\N{NO-BREAK SPACE}% on average."
    )
    assert f"worst on {claims.quoted('intact')} with the cue: 41.2" in probe
    assert probe.endswith("with 90.7\N{NO-BREAK SPACE}% on average.")
    assert readings.harm_claims(dataclasses.replace(tag(), quality=[]))[1].endswith("41.2\u00a0%.")


def test_best_repair_is_that_of_the_worst_group():
    said = readings.repair_claim(tag())
    assert said == (
        f"{claims.quoted('dfr')} raises the worst group most: from 65.7\N{NO-BREAK SPACE}% to "
        "69.3\N{NO-BREAK SPACE}%, average accuracy +3.6 points."
    )
    good = dataclasses.replace(tag().repairs[0], quality=quality("suppress", 0.96), restored=0.84)
    cue = dataclasses.replace(tag(), repairs=[good, tag().repairs[1]])
    assert "84\N{NO-BREAK SPACE}% of what was lost" in readings.repair_claim(cue)
    assert readings.repair_claim(cue).startswith(claims.quoted("suppress"))
    worse = dataclasses.replace(tag(), repairs=tag().repairs[:1])
    assert readings.repair_claim(worse).startswith("No repair raises")
    assert readings.points(0.5, 0.512) == f"{MINUS}1.2"


def test_calibration_is_of_the_probe():
    said = readings.calibration_claim(tag())
    assert said == (
        "AUROC of the probe: 0.928 over all images, 0.940 without the cue, 0.794 with it; "
        "calibration error 3.2\N{NO-BREAK SPACE}% and 15.1\N{NO-BREAK SPACE}%."
    )
    no_ece = dataclasses.replace(quality("probe", 0.907), ece_with=NAN)
    said = readings.calibration_claim(dataclasses.replace(tag(), quality=[no_ece]))
    assert said.endswith("0.794 with it.")


def test_groups_of_pairs_are_said_to_be_pairs():
    """Numbers over the pairs are not those over the images, and both are told."""
    cue = dataclasses.replace(tag(), source="pairs")
    assert "Groups from pairs" in readings.source_note(cue)
    assert "half with the cue" in readings.quality_note(cue)
    assert readings.harm_claims(cue)[1].endswith("on average over the pairs.")
    assert "over all pictures of the pairs" in readings.calibration_claim(cue)
    rows = [dataclasses.replace(row, accuracy_of_all=0.9) for row in cue.quality]
    after = dataclasses.replace(quality("dfr", 0.943), accuracy_of_all=0.85)
    repaired = dataclasses.replace(cue.repairs[1], quality=after)
    said = readings.repair_claim(dataclasses.replace(cue, quality=rows, repairs=[repaired]))
    assert f"over the pairs and {MINUS}5.0 points over all evaluated images" in said
    assert "metadata" in readings.source_note(dataclasses.replace(cue, source="metadata"))
    assert "inferred from latents" in readings.source_note(
        dataclasses.replace(cue, source="latents")
    )
    assert readings.source_note(tag()) == ""


@pytest.mark.parametrize(
    ("text", "probe", "excess", "words"),
    [
        (ABOVE, ABOVE, Interval(-0.2, -0.3, -0.1), "removal does not confirm"),
        (ABOVE, AROUND, ABOVE, "removal does not confirm"),
        (ABOVE, ABOVE, Interval(4e-6, 3e-6, 5e-6), "removal does not confirm"),
        (ABOVE, ABOVE, Interval(6e-6, 5e-6, 7e-6), ""),
        (AROUND, ABOVE, ABOVE, ""),
    ],
)
def test_what_removal_does_not_confirm_is_said_beside_the_latent(text, probe, excess, words):
    row = dataclasses.replace(
        latent(1, 7, significant=True, cues=[]), text=text, probe=probe, excess=excess
    )
    assert claims.is_confirmed(row) == (not words)
    for is_significant in (True, False):
        row = dataclasses.replace(row, is_significant=is_significant)
        page = render(dataclasses.replace(full_content(), amplified=[row]))
        assert page.count("removal does not confirm") == (1 if words and is_significant else 0)

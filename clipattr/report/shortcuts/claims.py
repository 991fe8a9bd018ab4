"""What the numbers about a cue say, in one sentence each, decided by the numbers alone.

A difference is called one only where its interval leaves 0 out; every sentence has a form for each
way the numbers can fall.
"""

import math
from collections.abc import Sequence

from clipattr.metrics.intervals import Interval
from clipattr.report.claims import UNDEFINED, described, direction
from clipattr.report.formatting import bounds, digits_of, is_defined, number, percent
from clipattr.report.shortcuts.content import (
    AmplifiedLatent,
    CueResult,
    EffectRow,
    ShortcutsContent,
)

PLACEBO_REMOVAL = "placebo of the removal"
"""measure of other latents of like energy, taken out"""
# Of the larger effect.
_LEAST_EXCESS = 1e-5


def headline_effect(cue: CueResult) -> EffectRow | None:
    """Of the first measure that has an excess and is no placebo, the score with the largest one."""
    effects = [row for row in cue.effects if not row.is_placebo]
    if not effects:
        return None
    first = next((row for row in effects if is_defined(row.excess)), effects[0])
    rows = [row for row in effects if row.measure == first.measure]
    return max(rows, key=lambda row: row.excess.mean if is_defined(row.excess) else -math.inf)


def excess_over_all(row: EffectRow) -> Interval:
    """Of the headline, which was chosen among the scores of its measure."""
    return row.excess if row.excess_all is None else row.excess_all


def leaning(excess: Interval, text: Interval, probe: Interval) -> int:
    """Does the probe use it more (1) or less (-1) than the prompt, or is neither shown (0)?

    Who is said to use it more must use it beyond chance; and what is below the rounding of float32
    is no difference, however narrow its interval.
    """
    found = direction(excess)
    if abs(excess.mean) < _LEAST_EXCESS * max(abs(text.mean), abs(probe.mean)):
        return 0
    return found if direction(probe if found > 0 else text) != 0 else 0


def is_confirmed(row: AmplifiedLatent) -> bool:
    """Taking the latent out shows the excess that its attribution promised."""
    return leaning(row.excess, row.text, row.probe) > 0


def quoted(text: str) -> str:
    """Between quotation marks, so that a name is not read as part of the sentence."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}"


def times(ratio: Interval) -> str:
    """A ratio with its interval: '14.4 times [12.3, 18.1]'."""
    digits = ratio_digits(ratio)
    return f"{number(ratio.mean, digits)} times {bounds(ratio, digits)}"


def ratio_digits(ratio: Interval) -> int:
    """Fewer for a large ratio, and enough to see on which side of 1 an interval lies."""
    if abs(ratio.mean - 1) < _LEAST_EXCESS:
        return 2
    return digits_of(ratio, 1 if abs(ratio.mean) >= 10 else 2, 1.0)


def amplification_claim(cue: CueResult) -> str:
    """Does the probe lean on the cue more than the prompt does, and how much more?"""
    row, name = headline_effect(cue), quoted(cue.name)
    if row is None:
        return _by_groups(cue, name)
    if not all(is_defined(each) for each in (row.text, row.probe, row.excess)):
        return f"Whether the probe leans on {name} more than the prompt does is {UNDEFINED}."
    if not is_defined(row.amplification):
        return _without_ratio(row, name)
    if row.amplification.mean < 0:
        return _against(row, name)
    ratio = times(row.amplification)
    return {
        1: f"The probe leans on {name} {ratio} as much as the prompt does.",
        0: f"That the probe leans on {name} more than the prompt does is not shown: it does "
        f"{ratio} as much.",
        -1: f"The probe leans on {name} less than the prompt does: {ratio} as much.",
    }[headline_leaning(row)]


def headline_leaning(row: EffectRow) -> int:
    """The same of a row that was chosen among the scores of its measure."""
    return leaning(excess_over_all(row), row.text, row.probe)


def _against(row: EffectRow, name: str) -> str:
    """The heads react in opposite directions."""
    mean, low, high = row.amplification
    size = times(Interval(-mean, -high, -low))
    strength = {
        1: f"and more strongly: {size} as much",
        0: f"and it is not shown that it does so more strongly: {size} as much",
        -1: f"and less strongly: {size} as much",
    }[headline_leaning(row)]
    return f"The probe reacts to {name} in the direction opposite to the prompt's, {strength}."


def _by_groups(cue: CueResult, name: str) -> str:
    """No image is shown with and without it; its groups may say something all the same."""
    found = [row for row in cue.quality if not math.isnan(row.worst_group)]
    if not found:
        return f"No effect of {name} was measured."
    parts = [
        f"{'prompts' if row.name == 'text' else row.name}: {percent(row.worst_group)} of the worst "
        f"group, {percent(row.accuracy)} on average"
        for row in found
    ]
    return (
        f"What {name} does to an image was not measured (no pairs, no latents, no prompt of it). "
        f"How often each head is right, by its groups: {'; '.join(parts)}."
    )


def _without_ratio(row: EffectRow, name: str) -> str:
    """The effect on the text head cannot be told from 0, so that nothing is divided by it."""
    why = "a ratio is not defined"
    if direction(row.text) == 0:
        why += ", because the prompt does not react beyond chance"
    found = headline_leaning(row)
    if found > 0:
        return f"The probe leans on {name} more than the prompt does ({_both(row)}); {why}."
    if found < 0:
        return f"The probe leans on {name} less than the prompt does ({_both(row)}); {why}."
    if direction(row.probe) != 0:
        return (
            f"The probe reacts to {name}, but that it does so more than the prompt is not shown "
            f"({_both(row)}); {why}."
        )
    if direction(row.text) != 0:
        return f"The probe does not react to {name} beyond chance ({_both(row)}); {why}."
    return f"Neither the probe nor the prompt reacts to {name} beyond chance ({_both(row)})."


def _both(row: EffectRow) -> str:
    return f"probe {described(row.probe)}, prompt {described(row.text)} standard deviations"


def choice_note(cue: CueResult) -> str:
    """Which score a headline is about, where there was a choice; else nothing."""
    row = headline_effect(cue)
    if row is None:
        return ""
    if not has_choice(cue):
        return f"Measured by: {row.measure}; score: {row.score}."
    n_scores = _count_scores(cue, row)
    return (
        f"Measured by: {row.measure}; score: {row.score}, the one with the largest excess of "
        f"{n_scores}, so the numbers flatter a little; that there is an excess is judged by an "
        f"interval that holds for all {n_scores} at once ({described(excess_over_all(row))})."
    )


def has_choice(cue: CueResult) -> bool:
    """The headline's measure has several scores, of which it is one."""
    row = headline_effect(cue)
    return row is not None and _count_scores(cue, row) > 1


def _count_scores(cue: CueResult, row: EffectRow) -> int:
    return len({each.score for each in cue.effects if each.measure == row.measure})


def placebo_claims(cue: CueResult) -> list[str]:
    """What the controls do on the score of the headline.

    Pictures of a placebo show nothing new: they are judged by the effect on the probe. Latents of
    like energy may be what the task is about, and then move both heads: their excess judges them.
    """
    row = headline_effect(cue)
    if row is None:
        return []
    placebos = [each for each in cue.effects if each.is_placebo and each.score == row.score]
    if not placebos:
        return ["No placebo was measured: what any change of this size would do is not known."]
    effects = [each for each in cue.effects if not each.is_placebo and each.score == row.score]
    return [
        _removal_claim(each, effects)
        if each.measure == PLACEBO_REMOVAL
        else _placebo_claim(each, effects)
        for each in placebos
    ]


def _removal_claim(placebo: EffectRow, effects: Sequence[EffectRow]) -> str:
    name, found = f"Control ({placebo.measure})", described(placebo.excess)
    if not is_defined(placebo.excess):
        return f"{name}: whether the probe leans on such latents more is {UNDEFINED}."
    found_leaning = leaning(placebo.excess, placebo.text, placebo.probe)
    if found_leaning < 0:
        return f"{name}: the probe leans less on such latents than the prompt (excess {found})."
    if found_leaning == 0:
        return (
            f"{name}: that the probe leans on such latents more than the prompt does is not shown "
            f"(excess {found})."
        )
    more = f"{name}: the probe leans on such latents more than the prompt does"
    cue = next((each for each in effects if each.measure in placebo.measure), None)
    if cue is None or not is_defined(cue.excess):
        return f"{more} (excess {found})."
    of_cue = headline_leaning(cue)
    if of_cue <= 0:
        but = "though not on the cue's" if of_cue < 0 else "which is not shown of the cue's"
        return f"{more} (excess {found}), {but}."
    said = f"{more} too (excess {found})"
    if placebo.excess.mean >= cue.excess.mean:
        return f"{said}, at least as much as on the cue's, so the excess is not the cue's own."
    return f"{said}, by {_share(placebo.excess.mean / cue.excess.mean)} of the excess of the cue's."


def _placebo_claim(placebo: EffectRow, effects: Sequence[EffectRow]) -> str:
    """Beside the effect of the measure that it is the placebo of, where it names one."""
    name = f"Control ({placebo.measure})"
    if not is_defined(placebo.probe):
        return f"{name}: its effect on the probe is {UNDEFINED}."
    found = described(placebo.probe)
    if direction(placebo.probe) == 0:
        return f"{name}: it does not move the probe beyond chance ({found})."
    probe = next((each.probe for each in effects if each.measure in placebo.measure), None)
    if probe is None or not is_defined(probe) or direction(probe) == 0:
        return f"{name}: it moves the probe ({found})."
    share = abs(placebo.probe.mean / probe.mean)
    if share >= 1:
        return (
            f"{name}: it moves the probe at least as much as the cue does ({found}), so the effect "
            "is not the cue's own."
        )
    return f"{name}: it moves the probe too ({found}), by {_share(share)} of what the cue does."


def _share(share: float) -> str:
    return "less than 1\N{NO-BREAK SPACE}%" if share < 0.01 else percent(share, 0)


def amplified_claim(content: ShortcutsContent) -> str:
    """What was found without naming a cue."""
    if content.amplified is None:
        return (
            "Latents were not ranked in this run: that was not asked for, or there is no sparse "
            "autoencoder."
        )
    rate = f"at a false discovery rate of {percent(content.level, 0)}"
    if content.n_significant == 0:
        return (
            "With no cue named, no latent is used more by the probe than by the prompt beyond "
            f"chance, by attribution ({rate})."
        )
    found = "pair of a latent and a score is" if content.n_significant == 1 else ""
    found = found or "pairs of a latent and a score are"
    said = (
        f"With no cue named, {content.n_significant:,} {found} used more by the probe than by the "
        f"prompt, by attribution ({rate})"
    )
    removed = [row for row in content.amplified if row.is_significant]
    if not removed:
        return f"{said}."
    first = removed[0]
    if len(removed) > 1:
        said += f"; of the {len(removed):,} taken out exactly, {_count_confirmed(removed)}"
    of = f", of {_listed(first.cues)}" if first.cues else ", of no cue that was named"
    means = f" ({', '.join(first.labels)})" if first.labels else ""
    confirmed = "confirms it" if is_confirmed(first) else "does not confirm it"
    return (
        f"{said}. The strongest is latent {first.latent}{means}{of}; taking it out {confirmed} "
        f"(excess {described(first.excess)})."
    )


def _count_confirmed(removed: Sequence[AmplifiedLatent]) -> str:
    count = sum(map(is_confirmed, removed))
    return f"{count or 'none'} {'is' if count < 2 else 'are'} confirmed"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(quoted(name) for name in names)

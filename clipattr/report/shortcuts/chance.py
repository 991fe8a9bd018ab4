"""What chance does beside an effect, in words, and what a placebo changes in a pair."""

import math

from clipattr.report.claims import direction
from clipattr.report.formatting import NOT_DEFINED, number
from clipattr.report.shortcuts.claims import (
    PLACEBO_REMOVAL,
    has_choice,
    headline_effect,
    headline_leaning,
    quoted,
)
from clipattr.report.shortcuts.content import CueResult, EffectRow, PairPicture

_RARE = 0.05
# With fewer, none that reacts as strongly is not yet rare.
_FEWEST_NULLS = 20


def chance_note(row: EffectRow) -> str:
    """A cell of the table of effects."""
    if not row.n_null or not math.isfinite(row.null_high):
        return NOT_DEFINED
    of = "as large as the cue\N{RIGHT SINGLE QUOTATION MARK}s" if _is_draws(row) else "as large"
    found = f"{_as_large(row)} of {row.n_null:,} {of}"
    if row.n_null < _FEWEST_NULLS:
        return found
    return f"95\N{NO-BREAK SPACE}% below {number(row.null_high)}; {found}"


def chance_claims(cue: CueResult) -> list[str]:
    """Whether the labels need to have taught the headline's effect; and what placebo latents do."""
    row = headline_effect(cue)
    if row is None:
        return []
    is_known = row.n_null >= _FEWEST_NULLS and math.isfinite(row.null_high)
    found = [_claim(cue, row)] if is_known else []
    draws = next(
        (each for each in cue.effects if _is_draws(each) and each.score == row.score), None
    )
    if draws is not None and draws.n_null and math.isfinite(draws.null_share):
        found.append(
            f"Of {draws.n_null} {'draw' if draws.n_null == 1 else 'draws'} of other latents, "
            f"{_said(_as_large(draws), 'moves', 'move')} the probe at least as much as the cue's "
            "latents do."
        )
    return found


def _is_draws(row: EffectRow) -> bool:
    return row.measure == PLACEBO_REMOVAL


def _as_large(row: EffectRow) -> int:
    """How many of them; of shuffled labels the share counts the probe itself as one more."""
    if _is_draws(row):
        return round(row.null_share * row.n_null)
    return round(row.null_share * (1 + row.n_null)) - 1


def _claim(cue: CueResult, row: EffectRow) -> str:
    n_as_large, probes = _as_large(row), f"{row.n_null:,} probes trained on shuffled labels"
    chosen = ", each on the score of its largest excess" if has_choice(cue) else ""
    below = (
        f"95\N{NO-BREAK SPACE}% of {probes} react by less than {number(row.null_high)} standard "
        f"deviations{chosen}"
    )
    if direction(row.probe) == 0:
        return f"For comparison: {below}."
    if row.null_share >= _RARE:
        taught = "That alone does not show that the labels taught it"
        start = taught if headline_leaning(row) > 0 else "For comparison"
        return (
            f"{start}: of {probes} {_said(n_as_large, 'reacts', 'react')} to {quoted(cue.name)} as "
            f"strongly{chosen}."
        )
    return (
        f"Chance does not explain how strongly the probe reacts: {below}, and "
        f"{_said(n_as_large, 'reacts', 'react')} as strongly as the probe."
    )


def _said(count: int, one: str, more: str) -> str:
    return f"{count or 'none'} {one if count < 2 else more}"


def pair_change(pair: PairPicture, head: str, state: str) -> float:
    """What the cue, or the placebo, adds to the score; as the effects count it."""
    without, with_cue, placebo = pair.scores[head]
    if state == "with":
        return with_cue - without
    return with_cue - placebo if pair.is_cut_out else placebo - without

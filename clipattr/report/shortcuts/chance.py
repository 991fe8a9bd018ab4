"""What chance does beside an effect, in words, and what a placebo changes in a pair."""

import math

from clipattr.report.claims import direction
from clipattr.report.formatting import NOT_DEFINED, number, percent
from clipattr.report.shortcuts.claims import PLACEBO_REMOVAL, headline_effect, quoted
from clipattr.report.shortcuts.content import CueResult, EffectRow, PairPicture

_RARE = 0.05


def chance_note(row: EffectRow) -> str:
    """A cell of the table of effects."""
    if not math.isfinite(row.null_high):
        return NOT_DEFINED
    of = "as large as the cue\N{RIGHT SINGLE QUOTATION MARK}s" if _is_draws(row) else "as large"
    return f"95\N{NO-BREAK SPACE}% below {number(row.null_high)}; {percent(row.null_share, 0)} {of}"


def chance_claims(cue: CueResult) -> list[str]:
    """Whether the labels need to have taught the headline's effect; and what placebo latents do."""
    row = headline_effect(cue)
    if row is None:
        return []
    found = [] if not math.isfinite(row.null_high) else [_claim(row, quoted(cue.name))]
    draws = next(
        (each for each in cue.effects if _is_draws(each) and each.score == row.score), None
    )
    if draws is not None and math.isfinite(draws.null_share):
        found.append(
            f"Of {draws.n} draws of other latents of like energy, {_percent(draws.null_share)} "
            "move the probe at least as much as the cue's latents do."
        )
    return found


def _is_draws(row: EffectRow) -> bool:
    return row.measure == PLACEBO_REMOVAL


def _claim(row: EffectRow, name: str) -> str:
    below = (
        f"95\N{NO-BREAK SPACE}% of probes trained on shuffled labels react by less than "
        f"{number(row.null_high)} standard deviations"
    )
    if direction(row.probe) == 0:
        return f"For comparison: {below}."
    if row.null_share >= _RARE:
        return (
            f"That alone does not show that the labels taught it: {_percent(row.null_share)} of "
            f"probes trained on shuffled labels react to {name} as strongly."
        )
    return (
        f"Chance does not explain how strongly the probe reacts: {below}, and "
        f"{_percent(row.null_share)} as strongly as the probe."
    )


def _percent(share: float) -> str:
    if share == 0:
        return "none"
    return "less than 1\N{NO-BREAK SPACE}%" if share < 0.01 else percent(share, 0)


def pair_change(pair: PairPicture, head: str, state: str) -> float:
    """What the cue, or the placebo, adds to the score; as the effects count it."""
    without, with_cue, placebo = pair.scores[head]
    if state == "with":
        return with_cue - without
    return with_cue - placebo if pair.is_cut_out else placebo - without

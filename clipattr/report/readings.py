"""What the page says in words about the numbers: which is best, which is worst, what follows.

Every sentence is decided by the numbers alone and has a form for each way they can fall.
"""

import math
from collections.abc import Sequence

from clipattr.metrics.intervals import Interval
from clipattr.report.claims import UNDEFINED, direction, lowers
from clipattr.report.content import (
    CueResult,
    Explained,
    GroupRow,
    MethodResult,
    ScorecardRow,
    UnexpectedResult,
)
from clipattr.report.formatting import is_defined

REFERENCE_METHOD = "exact"
_LOWER_IS_BETTER = {
    "deletion_auc": True,
    "insertion_auc": False,
    "spearman_exact": False,
    "pearson_exact": False,
    "overlap_exact": False,
    "global_deletion": True,
}


def verdict(row: ScorecardRow) -> str:
    """One sentence: which of the two methods ranks the responsible latent better.

    One that lowers the prompt's score belongs near the end: its rank is read the other way.
    """
    if not row.learned:
        return "The model did not learn this planted effect, so the ranks compare nothing here."
    if lowers(row):
        return (
            "A latent that lowers the score belongs near the end: attribution patching has it at "
            f"rank {row.rank_attribution}, logit lens at {row.rank_logit_lens} of {row.n_latents}."
        )
    if row.rank_attribution == row.rank_logit_lens:
        return f"Both methods put the responsible latent at rank {row.rank_attribution}."
    attribution_wins = row.rank_attribution < row.rank_logit_lens
    winner = "Attribution patching" if attribution_wins else "Logit lens"
    ranks = sorted((row.rank_attribution, row.rank_logit_lens))
    return f"{winner} ranks the responsible latent better: {ranks[0]} against {ranks[1]}."


def tally(rows: Sequence[ScorecardRow]) -> str:
    """The scorecard in one paragraph, what was not learned and what lowers the score apart."""
    learned = [row for row in rows if row.learned]
    down = [row for row in learned if lowers(row)]
    up = [row for row in learned if not lowers(row)]
    found = f"The model learned {len(learned)} of {len(rows)} planted effects."
    if up:
        counted = "these" if not down else f"the {len(up)} whose latent does not lower the score"
        attribution = sum(row.rank_attribution < row.rank_logit_lens for row in up)
        logit_lens = sum(row.rank_logit_lens < row.rank_attribution for row in up)
        found += (
            f" Among {counted}, attribution patching ranks the responsible latent better in "
            f"{attribution}, logit lens in {logit_lens}, and both equally in "
            f"{len(up) - attribution - logit_lens}."
        )
    if down:
        attribution = sum(row.rank_attribution > row.rank_logit_lens for row in down)
        logit_lens = sum(row.rank_logit_lens > row.rank_attribution for row in down)
        found += (
            f" In {len(down)} the responsible latent lowers the prompt's score on average and "
            f"belongs near the end: attribution patching has it nearer to it in {attribution}, "
            f"logit lens in {logit_lens}."
        )
    return found


def best_methods(methods: Sequence[MethodResult]) -> dict[str, set[str]]:
    """For each column of the table the names of the best methods, the reference left out.

    Means are compared as they are printed: two methods that show the same number share the mark.
    """
    best = {}
    for column, lower in _LOWER_IS_BETTER.items():
        printed = {}
        for method in methods:
            value: Interval = getattr(method, column)
            if method.name != REFERENCE_METHOD and math.isfinite(value.mean):
                printed[method.name] = round(value.mean, 3)
        target = min(printed.values(), default=0.0) if lower else max(printed.values(), default=0.0)
        best[column] = {name for name, value in printed.items() if value == target}
    return best


def worst_groups(groups: Sequence[GroupRow]) -> set[tuple[str, str]]:
    """(head, group) of the lowest accuracy of each head."""
    worst: dict[str, GroupRow] = {}
    for row in groups:
        if not math.isfinite(row.accuracy.mean):
            continue
        if row.head not in worst or row.accuracy.mean < worst[row.head].accuracy.mean:
            worst[row.head] = row
    return {(row.head, row.group) for row in worst.values()}


def amplification_reading(cue: CueResult) -> str:
    """One sentence: does the probe lean on the cue more than the text head does?"""
    low, high = cue.amplification.low, cue.amplification.high
    if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(cue.amplification.mean)):
        return "The ratio is not defined: the effect on the text head cannot be told from 0."
    if low > 1:
        return "The interval lies above 1: the probe relies on this cue more than the text head."
    if high < 0:
        return "The interval lies below 0: the probe reacts in the opposite direction."
    if high < 1:
        return "The interval lies below 1: the probe relies on this cue less than the text head."
    return "The interval includes 1: no amplification is shown."


def largest_bar(item: Explained) -> float:
    """The longest bar of a prediction, to which its other bars are scaled."""
    values = [value for card in item.latents for value in (card.attribution, card.effect)]
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def use_reading(row: ScorecardRow) -> str:
    """One sentence: does the latent raise the prompt's score, and in how many images?"""
    if not is_defined(row.mean_attribution):
        return f"Whether the latent raises the prompt's score is {UNDEFINED}."
    found = direction(row.mean_attribution)
    verb = {1: "raises", 0: "neither clearly raises nor lowers", -1: "lowers"}[found]
    return f"On average over all images the latent {verb} the prompt's score."


def unexpected_reading(found: UnexpectedResult) -> str:
    """What of the truth is among the first latents, and what chance finds."""
    kinds = "The model learned no planted failure, so that none can be found."
    if found.kinds_learned:
        kinds = (
            f"{len(found.kinds_found)} of the {len(found.kinds_learned)} kinds of failure that the "
            f"model learned are among the first {found.n_graded} latents (recall "
            f"{100 * found.recall:.0f} % of the learned failures, precision "
            f"{100 * found.precision:.0f} %; ranked by evidence alone, whatever latents mean: "
            f"{100 * found.recall_of_evidence:.0f} % and "
            f"{100 * found.precision_of_evidence:.0f} %)."
        )
    return (
        f"{kinds} The list has {found.n_listed} latents; of shuffled latents "
        f"and images {found.n_by_chance:.1f} would be on it."
    )

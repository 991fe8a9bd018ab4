"""What each plot shows, in one sentence: its caption, decided by the numbers alone.

A difference is called one only where its interval leaves 0 out.
"""

import math
from collections.abc import Sequence

from clipattr.metrics.intervals import Interval
from clipattr.report.content import (
    ClassRow,
    CorrectionResult,
    ExactResult,
    MethodResult,
    ScorecardRow,
)
from clipattr.report.formatting import bounds, number, percent, signed

SUBJECT = "attribution_patching"
FIRST = 10
"""latents of a ranking that a reader looks at"""
NOT_COMPARED = "Attribution patching and logit lens were not compared in this run."
_COMPARISONS = {
    "deletion_auc": ("Deletion", "lowers the score faster", "lowers the score more slowly"),
    "insertion_auc": ("Insertion", "restores the score faster", "restores the score more slowly"),
    "spearman_exact": ("Order", "agrees more with exact patching", "agrees less with it"),
    "pearson_exact": ("Values", "agrees more with exact patching", "agrees less with it"),
    "overlap_exact": ("Top latents", "finds more of the true ones", "finds fewer of the true ones"),
    "global_deletion": (
        "One order per noun",
        "lowers the score faster",
        "lowers the score more slowly",
    ),
}
_LOWER_IS_BETTER = ("deletion_auc", "global_deletion")
_RELATION = {1: "leads", 0: "is not clearly different from", -1: "trails"}


def direction(interval: Interval) -> int:
    """1 or -1 where the interval lies above or below 0, 0 where it does not or is not defined."""
    return int(interval.low > 0) - int(interval.high < 0)


def described(interval: Interval) -> str:
    """A difference with its interval."""
    return f"{signed(interval.mean)} {bounds(interval)}"


def method_claim(methods: Sequence[MethodResult], column: str) -> str:
    """Attribution patching against logit lens in one column, images paired."""
    difference = _difference(methods, column)
    if difference is None:
        return NOT_COMPARED
    name, better, worse = _COMPARISONS[column]
    lead = _lead(difference, column)
    if lead == 0:
        return (
            f"{name}: no difference between attribution patching and logit lens is shown "
            f"({described(difference)})."
        )
    words = better if lead > 0 else worse
    return f"{name}: attribution patching {words} than logit lens ({described(difference)})."


def _lead(difference: Interval, column: str) -> int:
    """1 where attribution patching is better."""
    return -direction(difference) if column in _LOWER_IS_BETTER else direction(difference)


def _difference(methods: Sequence[MethodResult], column: str) -> Interval | None:
    for method in methods:
        if method.name == SUBJECT:
            return method.minus_logit_lens[column]
    return None


def control_claim(
    methods: Sequence[MethodResult], control: Sequence[MethodResult], column: str
) -> str:
    """Whether attribution patching leads logit lens in each dictionary."""
    trained, untrained = (_difference(each, column) for each in (methods, control))
    if trained is None or untrained is None:
        return NOT_COMPARED
    name = _COMPARISONS[column][0]
    return (
        f"{name}: attribution patching {_RELATION[_lead(trained, column)]} logit lens with the "
        f"trained dictionary ({described(trained)}) and {_RELATION[_lead(untrained, column)]} it "
        f"with the untrained one ({described(untrained)})."
    )


def class_claim(classes: Sequence[ClassRow], column: str) -> str:
    """In how many classes the mean is on the side of attribution patching: a count, no test."""
    values = [getattr(row, column) for row in classes]
    sign = -1 if column in _LOWER_IS_BETTER else 1
    leads = [sign * value for value in values if math.isfinite(value)]
    name, better, _ = _COMPARISONS[column]
    return (
        f"{name}, by noun: attribution patching {better} than logit lens in "
        f"{sum(lead > 0 for lead in leads)} of {len(leads)} (means alone, without intervals)."
    )


def size_claim(corrections: CorrectionResult) -> str:
    """How large the corrections are beside the lens part."""
    parts = [f"{label} {percent(size.mean)}" for label, size in corrections.sizes.items()]
    return f"What logit lens leaves out, beside the size of the lens part: {', '.join(parts)}."


def gain_claim(corrections: CorrectionResult) -> str:
    """What the corrections do to the agreement with exact patching."""
    gain = corrections.gain
    if direction(gain) == 0:
        return (
            "The two corrections do not change the agreement with exact patching beyond chance "
            f"({described(gain)})."
        )
    verb = "raise" if gain.mean > 0 else "lower"
    return (
        f"The two corrections {verb} the agreement with exact patching ({described(gain)} over the "
        "lens part alone)."
    )


def exact_claim(result: ExactResult) -> str:
    """Which estimate follows the exact effect more closely over all pairs."""
    first, second = result.scatters
    words = "do not clearly differ in their correlation with the exact effect"
    if direction(result.difference) > 0:
        words = "differ: the first one correlates more with the exact effect"
    if direction(result.difference) < 0:
        words = "differ: the second one correlates more with the exact effect"
    return (
        f"Over all {result.n_pairs:,} pairs {first.label} ({number(first.pearson.mean)}) and "
        f"{second.label} ({number(second.pearson.mean)}) {words} (first minus second "
        f"{described(result.difference)})."
    )


def rank_claim(rows: Sequence[ScorecardRow]) -> str:
    """How many responsible latents are where a reader looks, and how many pull the other way."""
    learned = [row for row in rows if row.learned]
    if not learned:
        return "None of the planted effects was learned: the ranks compare nothing."
    by_attribution = sum(row.rank_attribution <= FIRST for row in learned)
    by_lens = sum(row.rank_logit_lens <= FIRST for row in learned)
    found = (
        f"Of the {len(learned)} latents of learned effects, attribution patching has "
        f"{by_attribution} among its first {FIRST}, logit lens {by_lens}."
    )
    negative = sum(direction(row.mean_attribution) < 0 for row in learned)
    if negative == 0:
        return found
    return (
        f"{found} Of these latents {negative} lower the prompt's score: their attributions rank "
        "behind all that raise it."
    )

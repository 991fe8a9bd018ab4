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
from clipattr.report.formatting import (
    NOT_DEFINED,
    bounds,
    digits_of,
    is_defined,
    number,
    percent,
    signed,
)

SUBJECT = "attribution_patching"
FIRST = 10
"""latents of a ranking that a reader looks at"""
NOT_COMPARED = "Attribution patching and logit lens were not compared in this run."
UNDEFINED = f"{NOT_DEFINED} in this run"
_COMPARISONS = {
    "deletion_auc": ("Deletion", "lowers the score faster", "lowers the score more slowly"),
    "insertion_auc": ("Insertion", "restores the score faster", "restores the score more slowly"),
    "spearman_exact": (
        "Order",
        "agrees more with exact patching",
        "agrees less with exact patching",
    ),
    "pearson_exact": (
        "Values",
        "agrees more with exact patching",
        "agrees less with exact patching",
    ),
    "overlap_exact": ("Top latents", "finds more of the true ones", "finds fewer of the true ones"),
    "global_deletion": (
        "One order per noun",
        "lowers the score faster",
        "lowers the score more slowly",
    ),
}
_LOWER_IS_BETTER = ("deletion_auc", "global_deletion")
_CURVES = {
    "deletion_auc": ("deletion_curve", "deleted"),
    "insertion_auc": ("insertion_curve", "inserted"),
    "global_deletion": ("deletion_curve", "deleted"),
}
"""columns that are areas: which depend on how many latents are edited"""
_RELATION = {1: "leads", 0: "is not clearly different from", -1: "trails"}


def direction(interval: Interval) -> int:
    """1 or -1 where the interval lies above or below 0, 0 where it does not or is not defined."""
    return int(interval.low > 0) - int(interval.high < 0)


def described(interval: Interval) -> str:
    """A difference with its interval, in digits that show on which side of 0 it lies."""
    if not is_defined(interval):
        if math.isfinite(interval.mean):
            return f"{signed(interval.mean)} with an interval that is {UNDEFINED}"
        return UNDEFINED
    digits = digits_of(interval)
    return f"{signed(interval.mean, digits)} {bounds(interval, digits)}"


def method_claim(methods: Sequence[MethodResult], column: str) -> str:
    """Attribution patching against logit lens in one column, images paired."""
    subject = _subject(methods)
    if subject is None:
        return NOT_COMPARED
    difference = subject.minus_logit_lens[column]
    name, better, worse = _COMPARISONS[column]
    if not is_defined(difference):
        return f"{name}: attribution patching minus logit lens is {described(difference)}."
    lead, over = _lead(difference, column), _over(subject, column)
    if lead == 0:
        return (
            f"{name}: no difference between attribution patching and logit lens is shown{over} "
            f"({described(difference)})."
        )
    words = better if lead > 0 else worse
    return f"{name}: attribution patching {words} than logit lens{over} ({described(difference)})."


def _over(method: MethodResult, column: str) -> str:
    """Over how many steps an area was taken."""
    if column not in _CURVES:
        return ""
    curve, edited = _CURVES[column]
    return f" over {len(getattr(method, curve)) - 1} {edited} latents"


def _lead(difference: Interval, column: str) -> int:
    """1 where attribution patching is better."""
    return -direction(difference) if column in _LOWER_IS_BETTER else direction(difference)


def _subject(methods: Sequence[MethodResult]) -> MethodResult | None:
    return next((method for method in methods if method.name == SUBJECT), None)


def control_claim(
    methods: Sequence[MethodResult], control: Sequence[MethodResult], column: str
) -> str:
    """Whether attribution patching leads logit lens in each dictionary."""
    subjects = [_subject(each) for each in (methods, control)]
    found = [each.minus_logit_lens[column] for each in subjects if each is not None]
    if len(found) < len(subjects):
        return NOT_COMPARED
    name, (trained, untrained) = _COMPARISONS[column][0], found
    return (
        f"{name}: attribution patching {_relation(trained, column)} logit lens with the trained "
        f"dictionary ({described(trained)}) and {_relation(untrained, column)} it with the "
        f"untrained one ({described(untrained)})."
    )


def _relation(difference: Interval, column: str) -> str:
    if not is_defined(difference):
        return "cannot be compared with"
    return _RELATION[_lead(difference, column)]


def class_claim(classes: Sequence[ClassRow], column: str) -> str:
    """In how many classes the mean is on the side of attribution patching: a count, no test."""
    values = [getattr(row, column) for row in classes]
    sign = -1 if column in _LOWER_IS_BETTER else 1
    leads = [sign * value for value in values if math.isfinite(value)]
    name, better, _ = _COMPARISONS[column]
    if not leads:
        return f"{name}, by noun: attribution patching minus logit lens is {UNDEFINED}."
    return (
        f"{name}, by noun: attribution patching {better} than logit lens in "
        f"{sum(lead > 0 for lead in leads)} of {len(leads)} (means alone, without intervals)."
    )


def size_claim(corrections: CorrectionResult) -> str:
    """How large the corrections are beside the lens part."""
    if not any(is_defined(size) for size in corrections.sizes.values()):
        return f"The size of what logit lens leaves out is {UNDEFINED}."
    parts = [f"{label} {percent(size.mean)}" for label, size in corrections.sizes.items()]
    return f"What logit lens leaves out, beside the size of the lens part: {', '.join(parts)}."


def gain_claim(corrections: CorrectionResult) -> str:
    """What the corrections do to the agreement with exact patching."""
    gain = corrections.gain
    if not is_defined(gain):
        return (
            "What the two corrections do to the agreement with exact patching is "
            f"{described(gain)}."
        )
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
    if not is_defined(result.difference):
        return (
            f"Over all {result.n_pairs:,} pairs the correlations of {first.label} and "
            f"{second.label} with the exact effect cannot be compared: their difference is "
            f"{described(result.difference)}."
        )
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
    """How many responsible latents are where a reader looks; those that pull back counted apart."""
    learned = [row for row in rows if row.learned]
    if not learned:
        return "None of the planted effects was learned: the ranks compare nothing."
    up = [row for row in learned if not lowers(row)]
    by_attribution = sum(row.rank_attribution <= FIRST for row in up)
    by_lens = sum(row.rank_logit_lens <= FIRST for row in up)
    counted = "latents of learned effects"
    if len(up) == len(learned):
        found = f"Of the {len(up)} {counted}"
    else:
        found = f"Of the {len(up)} {counted} that do not lower the prompt's score"
    found += (
        f", attribution patching has {by_attribution} among its first {FIRST}, logit lens "
        f"{by_lens}."
    )
    if len(up) == len(learned):
        return found
    return f"{found} Another {len(learned) - len(up)} lower it on average, and belong near the end."


def lowers(row: ScorecardRow) -> bool:
    """Whether the latent lowers the prompt's score on average, beyond chance."""
    return direction(row.mean_attribution) < 0

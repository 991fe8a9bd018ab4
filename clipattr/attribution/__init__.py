"""Why a prediction came out: functions of a score, activations and sparse codes."""

from clipattr.attribution.baselines import (
    act_times_logit_lens,
    energy,
    logit_lens,
    logit_lens_table,
    random_scores,
)
from clipattr.attribution.closed_form import LastLayerHead, closed_form_attribution, reliance_matrix
from clipattr.attribution.curves import area_under, deletion_curve, insertion_curve
from clipattr.attribution.exact import exact_patching
from clipattr.attribution.gradients import attribution_patching, integrated_gradients
from clipattr.attribution.ranking import active_order
from clipattr.attribution.score import HeadScore, Score

__all__ = [
    "HeadScore",
    "LastLayerHead",
    "Score",
    "act_times_logit_lens",
    "active_order",
    "area_under",
    "attribution_patching",
    "closed_form_attribution",
    "deletion_curve",
    "energy",
    "exact_patching",
    "insertion_curve",
    "integrated_gradients",
    "logit_lens",
    "logit_lens_table",
    "random_scores",
    "reliance_matrix",
]

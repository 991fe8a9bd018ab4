"""Why a prediction came out: functions of a score, activations and sparse codes.

Everywhere: `score`, `contrast`; references; the methods; `merge_tokens`; orders and curves;
`explain`, which puts them together for an image. At the last layer's class token the same in closed
form: `closed_form_attribution`, `class_attributions`, `lens_parts`, `read_edits`, and the sums over
a data set of `reliance`. `load_reliance` reads what an evaluation made of a data set.
"""

from clipattr.attribution.baselines import (
    act_times_logit_lens,
    energy,
    logit_lens,
    logit_lens_table,
    random_scores,
)
from clipattr.attribution.closed_form import (
    LastLayerHead,
    LensParts,
    LensTable,
    build_lens_table,
    class_attributions,
    closed_form_attribution,
    lens_parts,
)
from clipattr.attribution.curves import (
    Curves,
    area_under,
    both_curves,
    completeness_gap,
    deletion_curve,
    insertion_curve,
)
from clipattr.attribution.edits import LastLayerEdits, read_edits
from clipattr.attribution.exact import (
    corrected_patching,
    exact_patching,
    exact_patching_of_latents,
)
from clipattr.attribution.explanation import Explanation, explain
from clipattr.attribution.gradients import (
    attribution_patching,
    error_attribution,
    gradient_only,
    integrated_gradients,
    score_gradient,
    two_point,
)
from clipattr.attribution.patches import ReadParts, attribute_reads
from clipattr.attribution.ranking import active_order, global_steps, listed_steps, steps_of
from clipattr.attribution.references import (
    at_reference,
    minus_counterfactual,
    minus_mean,
    neuron_codes,
)
from clipattr.attribution.reliance import (
    RelianceSums,
    add_reliance,
    count_positive,
    empty_reliance,
    reliance_matrix,
)
from clipattr.attribution.reliance_files import (
    Reliance,
    RelianceOrigin,
    load_reliance,
    save_reliance,
)
from clipattr.attribution.score import HeadScore, Score, clean_scores, contrast
from clipattr.attribution.tokens import MergedCodes, merge_tokens

__all__ = [
    "Curves",
    "Explanation",
    "HeadScore",
    "LastLayerEdits",
    "LastLayerHead",
    "LensParts",
    "LensTable",
    "MergedCodes",
    "ReadParts",
    "Reliance",
    "RelianceOrigin",
    "RelianceSums",
    "Score",
    "act_times_logit_lens",
    "active_order",
    "add_reliance",
    "area_under",
    "at_reference",
    "attribute_reads",
    "attribution_patching",
    "both_curves",
    "build_lens_table",
    "class_attributions",
    "clean_scores",
    "closed_form_attribution",
    "completeness_gap",
    "contrast",
    "corrected_patching",
    "count_positive",
    "deletion_curve",
    "empty_reliance",
    "energy",
    "error_attribution",
    "exact_patching",
    "exact_patching_of_latents",
    "explain",
    "global_steps",
    "gradient_only",
    "insertion_curve",
    "integrated_gradients",
    "lens_parts",
    "listed_steps",
    "load_reliance",
    "logit_lens",
    "logit_lens_table",
    "merge_tokens",
    "minus_counterfactual",
    "minus_mean",
    "neuron_codes",
    "random_scores",
    "read_edits",
    "reliance_matrix",
    "save_reliance",
    "score_gradient",
    "steps_of",
    "two_point",
]

"""The columns of latents.parquet and unexpected.parquet."""

from collections.abc import Sequence

from torch import Tensor

from clipattr.jobs.atlas_inputs import Scored
from clipattr.jobs.atlas_pass import Found
from clipattr.jobs.atlas_unexpected import Unexpected
from clipattr.semantics.describe import Semantics

Columns = dict[str, Sequence[object]]


def _numbers(values: Tensor) -> list[object]:
    """None for nan: a table has a place for what is not known."""
    return [None if value != value else value for value in values.double().tolist()]


def latent_numbers(found: Found, semantics: Semantics) -> Columns:
    """What is a number of a latent; nearest_latent is one too."""
    activity, similarity = found.latents.activity, found.latents.monosemanticity
    assert activity is not None, "after the pass"
    assert similarity is not None, "after the pass"
    columns: Columns = {
        "frequency": _numbers(activity.firing_counts.cpu() / activity.n_rows),
        "mean_activation": _numbers(activity.mean.cpu()),
        "largest_activation": _numbers(activity.largest.cpu()),
        "clarity": _numbers(semantics.clarity),
        "monosemanticity": _numbers(similarity.cpu()),
        "polysemanticity": _numbers(semantics.polysemanticity),
        "nearest_cosine": _numbers(semantics.nearest_cosine),
        "nearest_latent": semantics.nearest_latent.tolist(),
        "label_margin": _numbers(semantics.label_margin),
    }
    if found.latents.spread is not None:
        columns["class_entropy"] = _numbers(found.latents.spread.entropy.cpu())
        columns["top_class_share"] = _numbers(found.latents.spread.top_share.cpu())
    return columns


def latent_columns(found: Found, semantics: Semantics, scored: Scored) -> Columns:
    """Everything about the latents, one row for each."""
    words, spread = scored.texts.words, found.latents.spread
    labels = [[words[row] for row in rows if row >= 0] for rows in semantics.labels.tolist()]
    columns: Columns = {
        "latent": list(range(len(labels))),
        "label": [each[0] if each else None for each in labels],
        "label_score": _numbers(semantics.label_scores[:, 0]),
        **latent_numbers(found, semantics),
        "labels": labels,
        "label_scores": [
            [score for score in scores if score == score]
            for scores in semantics.label_scores.double().tolist()
        ],
        "map_x": _numbers(semantics.position[:, 0]),
        "map_y": _numbers(semantics.position[:, 1]),
        "examples": [[row for row in rows if row >= 0] for rows in found.top.ids.tolist()],
    }
    if spread is not None:
        names = scored.texts.names
        columns["top_class"] = [
            None if number < 0 else names[number] for number in spread.top_class.tolist()
        ]
    return columns


def pair_columns(unexpected: Unexpected, scored: Scored, semantics: Semantics) -> Columns:
    """The ranked list."""
    pairs, texts = unexpected.pairs, scored.texts
    best = semantics.labels[:, 0].tolist()
    return {
        "rank": [pair.rank for pair in pairs],
        "class": [texts.names[pair.class_number] for pair in pairs],
        "latent": [pair.latent for pair in pairs],
        "label": [texts.words[best[pair.latent]] for pair in pairs],
        "evidence": [pair.evidence for pair in pairs],
        "share_of_attribution": [pair.share for pair in pairs],
        "specificity": [pair.specificity for pair in pairs],
        "mean_attribution": [pair.attribution for pair in pairs],
        "share_of_images": [pair.share_of_images for pair in pairs],
        "share_positive": [pair.share_positive for pair in pairs],
        "alignment": [pair.alignment for pair in pairs],
        "aligned_share": [pair.aligned_share for pair in pairs],
        "gap": [pair.gap for pair in pairs],
        "gap_sigmas": [pair.sigmas for pair in pairs],
        "counterpart": [pair.counterpart for pair in pairs],
        "kind": [pair.suggestions[0].kind.value for pair in pairs],
        "reasons": [[each.reason for each in pair.suggestions] for pair in pairs],
    }

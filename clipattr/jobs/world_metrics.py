"""The world evaluation's part of metrics.json: names that other tools read."""

from clipattr.jobs.attribution_metrics import collect_faithfulness
from clipattr.jobs.world_attribution import AgainstExact, Corrections
from clipattr.jobs.world_results import Inside, Shortcuts
from clipattr.jobs.world_scorecard import ScorecardEntry
from clipattr.jobs.world_unexpected import Grade
from clipattr.metrics.intervals import Interval
from clipattr.world.factors import NOUNS


def collect_metrics(
    inside: Inside, shortcuts: Shortcuts, zeroshot: dict[str, float]
) -> dict[str, object]:
    """All numbers, nested as they are named."""
    return {
        **collect_faithfulness(*inside.faithfulness, NOUNS),
        "completeness_gap": inside.faithfulness.local.completeness_gap,
        **_control_metrics(inside),
        "corrections": correction_metrics(inside.corrections),
        "against_exact": exact_metrics(inside.against_exact),
        "sae": inside.reconstruction.sae,
        "splice": inside.reconstruction.splice,
        "zeroshot": {name: {"accuracy": value} for name, value in zeroshot.items()},
        "scorecard": {entry.failure.name: scorecard_metrics(entry) for entry in inside.scorecard},
        **_unexpected_metrics(inside.unexpected),
        "shortcut": shortcut_metrics(shortcuts),
        "probe": _accuracies(shortcuts, "probe"),
        "text": _accuracies(shortcuts, "text"),
    }


def _control_metrics(inside: Inside) -> dict[str, object]:
    """The same table of the untrained dictionary, if it was measured."""
    if inside.control is None:
        return {}
    found = collect_faithfulness(*inside.control, NOUNS)
    return {"control": {name: found[name] for name in ("faithfulness", "logit_lens_unrestricted")}}


def _unexpected_metrics(grade: Grade | None) -> dict[str, object]:
    """How the list of an atlas does against the truth, if one was given."""
    if grade is None:
        return {}
    failures = {
        each.failure.name: {
            "learned": each.learned,
            "rank": each.rank,
            "kind": each.kind,
            "latents": each.latents.tolist(),
        }
        for each in grade.planted
    }
    return {
        "unexpected": {
            "precision": grade.precision,
            "recall": grade.recall,
            "precision_of_evidence": grade.precision_of_evidence,
            "recall_of_evidence": grade.recall_of_evidence,
            "kinds_learned": grade.kinds_learned,
            "kinds_found": grade.kinds_found,
            "graded": grade.n_graded,
            "listed": grade.n_listed,
            "by_chance": grade.n_by_chance,
            "failures": failures,
        }
    }


def correction_metrics(corrections: Corrections) -> dict[str, object]:
    """`corrections.{size,agreement}.<part or step>.{mean,low,high}` and what they are worth."""
    return {
        "size": {name: _interval(found) for name, found in corrections.size.items()},
        "agreement": {name: _interval(found) for name, found in corrections.agreement.items()},
        "gain": _interval(corrections.gain),
        "lens_part_pearson": _interval(corrections.lens_part_pearson),
    }


def exact_metrics(found: AgainstExact) -> dict[str, object]:
    """`against_exact.<method>.pearson.{mean,low,high}`, over how many pairs."""
    return {
        "n_images": found.n_images,
        "n_pairs": found.n_pairs,
        "n_drawn": len(found.drawn),
        **{name: {"pearson": _interval(pearson)} for name, pearson in found.pearson.items()},
        "difference": _interval(found.difference),
        "lens_scale": found.lens_scale,
    }


def scorecard_metrics(entry: ScorecardEntry) -> dict[str, object]:
    """`scorecard.<failure>.<number>`."""
    return {
        "rank_attribution": entry.rank_attribution,
        "rank_logit_lens": entry.rank_logit_lens,
        "auroc": entry.auroc,
        "latent": entry.latent,
        "score_auroc": entry.score_auroc,
        "learned": entry.learned,
        "mean_attribution": _interval(entry.use.mean_attribution),
        "share_of_images": entry.use.share_of_images,
        "share_positive": entry.use.share_positive,
    }


def shortcut_metrics(shortcuts: Shortcuts) -> dict[str, object]:
    """`shortcut.<cue>.{effect_text,effect_probe,amplification}.{mean,low,high}` and the shares."""
    return {
        entry.cue.name: {
            "effect_text": _interval(entry.effect_text),
            "effect_probe": _interval(entry.effect_probe),
            "amplification": _interval(entry.amplification),
            **{f"removal_{head}": _interval(found) for head, found in entry.removal.items()},
            **{f"share_{head}": share for head, share in entry.share.items()},
            "latents": entry.latents.tolist(),
        }
        for entry in shortcuts.cues
    }


def _accuracies(shortcuts: Shortcuts, head: str) -> dict[str, float]:
    quality = shortcuts.heads[head]
    return {
        "accuracy": quality.counts.average_accuracy,
        "worst_group_accuracy": quality.counts.worst_group_accuracy,
        "gap": quality.counts.gap,
        "auroc_with_tag": quality.auroc_with,
        "auroc_without_tag": quality.auroc_without,
    }


def _interval(interval: Interval) -> dict[str, float]:
    return interval._asdict()

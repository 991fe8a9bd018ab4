"""The world evaluation's part of metrics.json: names that other tools read."""

from clipattr.jobs.world_results import Inside, Shortcuts
from clipattr.metrics.intervals import Interval


def collect_metrics(
    inside: Inside, shortcuts: Shortcuts, zeroshot: dict[str, float]
) -> dict[str, object]:
    """All numbers, nested as they are named."""
    return {
        "faithfulness": faithfulness_metrics(inside),
        "completeness_gap": inside.faithfulness.completeness_gap,
        "sae": inside.reconstruction.sae,
        "splice": inside.reconstruction.splice,
        "zeroshot": {name: {"accuracy": value} for name, value in zeroshot.items()},
        "scorecard": {
            entry.failure.name: {
                "rank_attribution": entry.rank_attribution,
                "rank_logit_lens": entry.rank_logit_lens,
                "auroc": entry.auroc,
                "latent": entry.latent,
                "score_auroc": entry.score_auroc,
                "learned": entry.learned,
            }
            for entry in inside.scorecard
        },
        "shortcut": shortcut_metrics(shortcuts),
        "probe": _accuracies(shortcuts, "probe"),
        "text": _accuracies(shortcuts, "text"),
    }


def faithfulness_metrics(inside: Inside) -> dict[str, object]:
    """`faithfulness.<method>.<number>.{mean,low,high}`."""
    table: dict[str, object] = {}
    for method, result in inside.faithfulness.results.items():
        numbers: dict[str, object] = {
            "deletion_auc": _interval(result.deletion_auc),
            "insertion_auc": _interval(result.insertion_auc),
            "spearman_exact": _interval(result.spearman_exact),
            "overlap_exact": _interval(result.overlap_exact),
            "n_undefined": result.n_undefined,
        }
        if result.minus_logit_lens is not None:
            numbers["minus_logit_lens"] = {"deletion_auc": _interval(result.minus_logit_lens)}
        table[method.name] = numbers
    return table


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

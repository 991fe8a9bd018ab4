"""The world evaluation's part of metrics.json: names that other tools read."""

from typing import TYPE_CHECKING

from clipattr.metrics.intervals import Interval

if TYPE_CHECKING:
    from clipattr.jobs.evaluate_world import Inside, Shortcuts


def collect_metrics(
    inside: "Inside", shortcuts: "Shortcuts", zeroshot: dict[str, float]
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


def faithfulness_metrics(inside: "Inside") -> dict[str, object]:
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


def shortcut_metrics(shortcuts: "Shortcuts") -> dict[str, object]:
    """`shortcut.<cue>.{effect_text,effect_probe,amplification}.{mean,low,high}` and the shares."""
    return {
        entry.cue.name: {
            "effect_text": _interval(entry.effect_text),
            "effect_probe": _interval(entry.effect_probe),
            "amplification": _interval(entry.amplification),
            "share_text": entry.share_text,
            "share_probe": entry.share_probe,
            "latents": entry.latents.tolist(),
        }
        for entry in shortcuts.cues
    }


def _accuracies(shortcuts: "Shortcuts", head: str) -> dict[str, float]:
    counts = shortcuts.counts[head]
    return {
        "accuracy": counts.average_accuracy,
        "worst_group_accuracy": counts.worst_group_accuracy,
        "gap": counts.gap,
    }


def _interval(interval: Interval) -> dict[str, float]:
    return interval._asdict()

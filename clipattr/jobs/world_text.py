"""The sentences of the world's page; every number in them comes from metrics.json."""

from typing import Any

from clipattr.callbacks import FaithfulnessCallback
from clipattr.config.choices import Method
from clipattr.config.schema import EvaluationConfig
from clipattr.jobs.world_scorecard import LEARNED_AUROC
from clipattr.jobs.world_shortcuts import CUE_AUROC
from clipattr.report import Fact, HowRow

METHOD_LABELS = {
    Method.attribution_patching: "attribution patching",
    Method.integrated_gradients: "integrated gradients",
    Method.act_times_logit_lens: "activation x logit lens",
    Method.logit_lens: "logit lens",
    Method.energy: "energy",
    Method.random: "random",
    Method.exact: "exact patching",
}


def summarise(metrics: dict[str, Any]) -> list[str]:
    """Three sentences, one per question, whichever way the numbers fall."""
    sae, tag, seal = metrics["sae"], metrics["shortcut"]["tag"], metrics["shortcut"]["seal"]
    inside = (
        f"Inside: {100 * (1 - sae['fvu']):.1f} % of the variance of the class token is carried by "
        f"{sae['l0']:.1f} active latents per image."
    )
    return [inside, _faithful(metrics["faithfulness"]), _shortcut(tag, seal)]


def _faithful(table: dict[str, Any]) -> str:
    if "attribution_patching" not in table:
        return "How: attribution patching was not evaluated."
    agreement = table["attribution_patching"]["spearman_exact"]["mean"]
    lens = table["logit_lens"]["spearman_exact"]["mean"]
    difference = table["attribution_patching"]["minus_logit_lens"]["deletion_auc"]
    reading = "not clearly different from"
    if difference["high"] < 0:
        reading = "more faithful than"
    if difference["low"] > 0:
        reading = "less faithful than"
    return (
        "How: the ranking of attribution patching agrees with exact patching at a Spearman of "
        f"{agreement:.2f}, that of logit lens at {lens:.2f}; by deletion attribution patching is "
        f"{reading} logit lens "
        f"({difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}])."
    )


def _shortcut(tag: dict[str, Any], seal: dict[str, Any]) -> str:
    ratio = tag["amplification"]
    is_amplified = ratio["low"] is not None and ratio["low"] > 1
    verdict = "amplifies the planted tag" if is_amplified else "does not clearly amplify the tag"
    return (
        f"Shortcut: the probe {verdict} (its effect over the text head's: "
        f"{describe_ratio(ratio)}); for the control seal it is "
        f"{describe_ratio(seal['amplification'])}."
    )


def describe_ratio(ratio: dict[str, Any]) -> str:
    """A ratio with its interval; null in metrics.json says that there is none."""
    if ratio["mean"] is None:
        return "not defined, the text head's effect cannot be told from 0"
    return f"{ratio['mean']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def list_facts(metrics: dict[str, Any]) -> list[Fact]:
    """Headline numbers."""
    sae, zeroshot = metrics["sae"], metrics["zeroshot"]
    facts = [
        Fact("unexplained variance", f"{sae['fvu']:.3f}", "FVU of the SAE; 0 is perfect"),
        Fact("active latents", f"{sae['l0']:.1f}", "per image, mean (L0)"),
        Fact(
            "dead latents", f"{100 * sae['dead_fraction']:.1f} %", "never fired on the test images"
        ),
        Fact(
            "splice error", f"{metrics['splice']['max_error']:.0e}", "without an edit; 0 in theory"
        ),
        Fact(
            "completeness gap",
            f"{100 * metrics['completeness_gap']:.3f} %",
            "of integrated gradients; 0 in theory",
        ),
    ]
    facts += [
        Fact(f"zero-shot {name}", f"{row['accuracy']:.3f}", "accuracy, planted correlations broken")
        for name, row in zeroshot.items()
    ]
    probe, text = metrics["probe"], metrics["text"]
    note = "label x tag groups, balanced test split"
    facts.append(Fact("probe, worst group", f"{probe['worst_group_accuracy']:.3f}", note))
    facts.append(Fact("text, worst group", f"{text['worst_group_accuracy']:.3f}", note))
    return facts


def describe_how(settings: EvaluationConfig, measured: FaithfulnessCallback) -> list[HowRow]:
    """How every number was made, with what was really used."""
    intervals = f"95 % percentile bootstrap over images, {settings.resamples} resamples"
    return [
        *_how_scorecard(),
        *_how_faithfulness(settings, measured, intervals),
        *_how_shortcut(intervals),
        HowRow(
            "label of a latent",
            "word whose prompt is nearest to the mean embedding of the latent's top "
            f"{settings.top_examples} images, the empty prompt's cosine subtracted",
            "clipattr.semantics.labels",
        ),
        HowRow(
            "explained variance",
            "1 - sum |x - x_hat|^2 / sum |x - mean|^2, both over the whole test set in float64",
            "clipattr.metrics.reconstruction",
        ),
    ]


def _how_scorecard() -> list[HowRow]:
    return [
        HowRow(
            "rank of a latent",
            "the number of latents whose value for the prompt is at least as high: the mean "
            "attribution over all test images, or the cosine of the direction with the prompt",
            "clipattr.attribution.closed_form.reliance_matrix",
        ),
        HowRow(
            "AUROC of a latent",
            "probability that an image with the planted factor activates the latent more than one "
            "without; the latent with the highest value is the truth",
            "clipattr.metrics.ranks.auroc",
        ),
        HowRow(
            "learned",
            "the prompt's score separates images with the factor from the others with an AUROC of "
            f"at least {LEARNED_AUROC}, images of the prompt's own class left out",
            "clipattr.jobs.world_scorecard.grade",
        ),
    ]


def _how_faithfulness(
    settings: EvaluationConfig, measured: FaithfulnessCallback, intervals: str
) -> list[HowRow]:
    return [
        HowRow(
            "deletion and insertion AUC",
            f"mean height of the score of the predicted noun over {measured.n_steps} steps, active "
            f"latents only, error term kept; sum of areas over sum of clean scores; {intervals}",
            "clipattr.attribution.curves",
        ),
        HowRow(
            "agreement with exact patching",
            "Spearman over the active latents of each image, overlap of the top "
            f"{settings.overlap_top}; {len(measured.targets)} images",
            "clipattr.metrics.ranks",
        ),
        HowRow(
            "attribution patching",
            "a_j (v_j . g), g the gradient of the score at the clean activation",
            "clipattr.attribution.gradients.attribution_patching",
        ),
        HowRow(
            "integrated gradients",
            f"{settings.ig_steps} points between the rest alone and the clean activation, by the "
            "Gauss-Legendre rule",
            "clipattr.attribution.gradients.integrated_gradients",
        ),
        HowRow(
            "completeness gap",
            "sum over images of |sum of attributions - (y(x) - y(rest))| over the sum of "
            "|y(x) - y(rest)|, for integrated gradients",
            "clipattr.attribution.curves.completeness_gap",
        ),
    ]


def _how_shortcut(intervals: str) -> list[HowRow]:
    return [
        HowRow(
            "effect of a sticker",
            "score with the sticker minus score of the same scene without, in standard deviations "
            f"of the head's score over the balanced task images; {intervals}",
            "clipattr.shortcuts.amplification.pair_effects",
        ),
        HowRow(
            "amplification",
            "the probe's mean effect over the text head's mean effect, scenes paired; not defined "
            f"where the interval of the text head's effect includes 0; {intervals}",
            "clipattr.shortcuts.amplification.amplification_ratio",
        ),
        HowRow(
            "share of the attribution",
            "signed sum of the attributions of the sticker's latents over the sum of all absolute "
            f"attributions; its latents separate it with an AUROC of at least {CUE_AUROC} (or are "
            "the best one)",
            "clipattr.shortcuts.amplification.attribution_share",
        ),
    ]

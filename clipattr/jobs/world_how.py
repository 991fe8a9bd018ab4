"""How every number of the world's page was made."""

from clipattr.config.schema import EvaluationConfig
from clipattr.jobs.world_results import Inside
from clipattr.jobs.world_scorecard import LEARNED_AUROC
from clipattr.jobs.world_shortcuts import CUE_AUROC
from clipattr.report import HowRow


def describe_how(settings: EvaluationConfig, inside: Inside) -> list[HowRow]:
    """How every number was made, with what was really used."""
    intervals = f"95 % percentile bootstrap over images, {settings.resamples} resamples"
    return [
        *_how_scorecard(intervals),
        *_how_faithfulness(settings, inside, intervals),
        *_how_reasons(inside, intervals),
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


def _how_scorecard(intervals: str) -> list[HowRow]:
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
            "attribution of a latent",
            "attribution patching of the prompt's score, averaged over all test images, 0 where it "
            f"does not fire; {intervals}; the sign counted over the images where it fires",
            "clipattr.jobs.world_scorecard.use_of_latent",
        ),
        HowRow(
            "learned",
            "the prompt's score separates images with the factor from the others with an AUROC of "
            f"at least {LEARNED_AUROC}, images of the prompt's own class left out",
            "clipattr.jobs.world_scorecard.grade",
        ),
    ]


def _how_faithfulness(settings: EvaluationConfig, inside: Inside, intervals: str) -> list[HowRow]:
    measured = inside.faithfulness.local
    return [
        HowRow(
            "deletion and insertion AUC",
            f"mean height of the score of the predicted noun over {measured.n_steps} steps, active "
            "latents only, error term kept; sum of areas over sum of clean scores, not defined "
            f"where that is not above 0; {intervals}",
            "clipattr.attribution.curves",
        ),
        HowRow(
            "agreement with exact patching",
            "Spearman and Pearson over the active latents of each image, overlap of the top "
            f"{settings.overlap_top}; {len(measured.targets)} images",
            "clipattr.metrics.ranks",
        ),
        HowRow(
            "bands of the curves",
            "mean score after each step +- 1.96 standard errors over images",
            "clipattr.callbacks.faithfulness_result.summarise",
        ),
        HowRow(
            "one order per noun",
            "latents ranked by their attribution summed over the images of the predicted noun, the "
            "same ones deleted in each of its images where they fired",
            "clipattr.callbacks.global_deletion",
        ),
        HowRow(
            "difference from logit lens",
            f"of the same images, resampled together; sums first for AUCs; {intervals}",
            "clipattr.metrics.intervals",
        ),
        HowRow(
            "noun by noun",
            "the same AUC and Spearman over the images predicted as that noun, no interval",
            "clipattr.callbacks.faithfulness_result.mean_by_class",
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


def _how_reasons(inside: Inside, intervals: str) -> list[HowRow]:
    exact = inside.against_exact
    rows = [
        HowRow(
            "size of a part",
            "sum of its absolute values over that of the lens part, over all pairs of image and "
            f"active latent, for the predicted noun; {intervals}",
            "clipattr.attribution.closed_form.lens_parts",
        ),
        HowRow(
            "agreement step by step",
            "Spearman with exact patching over the active latents of each image: of logit lens, "
            "times activation, with directions not normalised (lens part), less one correction, "
            "less both; the gain is paired by image",
            "clipattr.jobs.world_attribution.measure_corrections",
        ),
        HowRow(
            "correlation over all pairs",
            f"Pearson over {exact.n_pairs} pairs of {exact.n_images} images at once, which weighs "
            f"large effects most; whole images resampled; {len(exact.drawn)} pairs drawn, seed of "
            "the run",
            "clipattr.metrics.pooled_correlation",
        ),
    ]
    if inside.control is not None:
        untrained = inside.control.local.spliced.sae
        rows.append(
            HowRow(
                "untrained dictionary",
                f"{untrained.n_latents} random unit directions around the mean of the images, "
                f"{untrained.max_active} active: as many as in the trained one on average",
                "clipattr.jobs.untrained.build_untrained",
            )
        )
    return rows


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

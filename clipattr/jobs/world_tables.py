"""The measurements about attribution as content of the page."""

from clipattr.config.choices import Method
from clipattr.jobs.world_attribution import AgainstExact, Corrections
from clipattr.jobs.world_results import Faithfulness
from clipattr.jobs.world_text import METHOD_LABELS, PART_LABELS, STEP_LABELS
from clipattr.jobs.world_unexpected import Grade
from clipattr.report import (
    ClassRow,
    CorrectionResult,
    ExactResult,
    MethodResult,
    ScatterResult,
    UnexpectedResult,
    UnexpectedRow,
)
from clipattr.world.factors import NOUNS


def method_results(found: Faithfulness) -> list[MethodResult]:
    """A row of the table for each method."""
    rows = []
    for method, result in found.local.results.items():
        whole = found.by_class_mean.results[method]
        differences = dict(result.differences)
        if whole.minus_logit_lens is not None:
            differences["global_deletion"] = whole.minus_logit_lens
        rows.append(
            MethodResult(
                name=method.name,
                label=METHOD_LABELS[method],
                deletion_curve=result.deletion_curve,
                insertion_curve=result.insertion_curve,
                deletion_error=result.deletion_error,
                insertion_error=result.insertion_error,
                deletion_auc=result.deletion_auc,
                insertion_auc=result.insertion_auc,
                spearman_exact=result.spearman_exact,
                pearson_exact=result.pearson_exact,
                overlap_exact=result.overlap_exact,
                global_deletion=whole.deletion_auc,
                minus_logit_lens=differences,
            )
        )
    return rows


def unexpected_result(grade: Grade | None) -> UnexpectedResult | None:
    """The list of an atlas against the truth, if there is one."""
    if grade is None:
        return None
    rows = [
        UnexpectedRow(each.failure.title, each.failure.prompt, each.learned, each.rank, each.kind)
        for each in grade.planted
    ]
    return UnexpectedResult(
        rows=rows,
        precision=grade.precision,
        recall=grade.recall,
        precision_of_evidence=grade.precision_of_evidence,
        recall_of_evidence=grade.recall_of_evidence,
        kinds_learned=grade.kinds_learned,
        kinds_found=grade.kinds_found,
        n_graded=grade.n_graded,
        n_listed=grade.n_listed,
        n_by_chance=grade.n_by_chance,
    )


def class_rows(found: Faithfulness) -> list[ClassRow]:
    """Attribution patching minus logit lens on the images of each noun that was predicted."""
    by_class = found.local.by_class
    if Method.attribution_patching not in by_class:
        return []
    lens = by_class[Method.logit_lens]
    return [
        ClassRow(
            name=NOUNS[number],
            n_images=int(row["images"]),
            spearman_exact=row["spearman_exact"] - lens[number]["spearman_exact"],
            deletion_auc=row["deletion_auc"] - lens[number]["deletion_auc"],
        )
        for number, row in by_class[Method.attribution_patching].items()
    ]


def correction_result(found: Corrections) -> CorrectionResult:
    """In words."""
    return CorrectionResult(
        sizes={PART_LABELS[name]: size for name, size in found.size.items()},
        steps={STEP_LABELS[name]: agreement for name, agreement in found.agreement.items()},
        gain=found.gain,
        lens_part_pearson=found.lens_part_pearson,
    )


def exact_result(found: AgainstExact) -> ExactResult | None:
    """The pairs that are drawn, and the correlations of all; None where no latent is active."""
    if found.n_pairs == 0:
        return None
    exact, *estimates = found.drawn.T.tolist()
    return ExactResult(
        scatters=[
            ScatterResult(name, METHOD_LABELS[Method[name]], exact, estimate, pearson)
            for (name, pearson), estimate in zip(found.pearson.items(), estimates, strict=True)
        ],
        difference=found.difference,
        n_images=found.n_images,
        n_pairs=found.n_pairs,
        lens_scale=found.lens_scale,
    )

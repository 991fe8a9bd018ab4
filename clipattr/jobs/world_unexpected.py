"""How much of what the world plants is on the list of unexpected reliance, which was told nothing.

A pair (class, latent) of the list is true where the latent carries the factor of a planted failure
of that class: its firing separates images with the factor from others, among those that do not show
the class itself, as `world_scorecard` asks of the score.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from pyarrow import parquet
from torch import Tensor

from clipattr.attribution import load_reliance
from clipattr.errors import DataError
from clipattr.jobs.world_scorecard import latents_of
from clipattr.runs import read_json
from clipattr.semantics.unexpected import find_candidates, first_of_each_latent, speaking_for
from clipattr.world.prompts import Failure

CARRIES_AUROC = 0.8
"""separation from which a latent carries a factor"""
TOP = 20
"""rows of the list that are graded"""


class Listed(NamedTuple):
    """A row of the list."""

    class_name: str
    latent: int
    kind: str


class Planted(NamedTuple):
    """A planted failure, and where the list has it."""

    failure: Failure
    learned: bool
    latents: Int[Tensor, " truth"]
    """those that carry its factor"""
    rank: int | None
    """of the first true pair, from 1; None: the list has none"""
    kind: str
    """that was suggested there"""


class Grade(NamedTuple):
    """The list against the truth."""

    planted: list[Planted]
    precision: float
    """of the first rows, share that is a planted pair; other reliance counts as wrong"""
    recall: float
    """of the failures that the model learned, share with a true pair among the first rows"""
    kinds_learned: list[str]
    kinds_found: list[str]
    """of the kinds that it learned those with a true pair among the first rows"""
    n_graded: int
    n_listed: int
    n_by_chance: float
    """as strong ones of shuffled latents and images"""
    precision_of_evidence: float
    recall_of_evidence: float
    """of the baseline"""


class FoundList(NamedTuple):
    """What the job atlas found."""

    rows: list[Listed]
    by_evidence: list[Listed]
    """the same ranking of all latents that drive a class, whatever they mean: a baseline"""
    n_by_chance: float


def read_list(folder: str) -> FoundList:
    """The list and what chance finds, of the folder of an atlas."""
    path = Path(folder) / "unexpected.parquet"
    metrics = read_json(Path(folder) / "metrics.json")
    if not path.is_file() or metrics is None:
        raise DataError(
            f"atlas={folder}: has no {path.name}; run evaluate.py configs/demo/atlas.yaml"
        )
    rows = parquet.read_table(path, columns=["rank", "class", "latent", "kind"]).to_pylist()
    listed = [
        Listed(row["class"], row["latent"], row["kind"]) for row in rows if row["rank"] is not None
    ]
    return FoundList(listed, _rank_by_evidence(folder), metrics["atlas"]["unexpected"]["by_chance"])


def _rank_by_evidence(folder: str) -> list[Listed]:
    """What the evidence alone puts first."""
    reliance = load_reliance(folder)
    mean = reliance.mean_attribution
    candidates = find_candidates(mean, speaking_for(mean))
    evidence = candidates.evidence
    order = evidence.argsort(descending=True, stable=True)
    is_first = first_of_each_latent(candidates.latents, evidence)
    ranked = candidates.select(order[is_first[order]])
    names = reliance.origin.class_names
    return [
        Listed(names[number], latent, "")
        for number, latent in zip(ranked.classes.tolist(), ranked.latents.tolist(), strict=True)
    ]


def grade_list(
    found: FoundList,
    failures: Sequence[tuple[Failure, bool]],
    *,
    activations: Float[Tensor, "image latent"],
    shows_factor: Sequence[Bool[Tensor, " image"]],
    shows_class: Sequence[Bool[Tensor, " image"]],
) -> Grade:
    """Of the failures with whether the model learned each, and their masks over the images."""

    def find_planted(listed: Sequence[Listed]) -> list[Planted]:
        return [
            _find(listed, failure, learned, activations[~of_class], has_factor[~of_class])
            for (failure, learned), has_factor, of_class in zip(
                failures, shows_factor, shows_class, strict=True
            )
        ]

    planted = find_planted(found.rows)
    learned = [each for each in planted if each.learned]
    precision, recall = _measure(planted, found.rows)
    baseline = _measure(find_planted(found.by_evidence), found.by_evidence)
    return Grade(
        planted=planted,
        precision=precision,
        recall=recall,
        kinds_learned=_kinds(learned),
        kinds_found=_kinds([each for each in learned if _is_early(each)]),
        n_graded=TOP,
        n_listed=len(found.rows),
        n_by_chance=found.n_by_chance,
        precision_of_evidence=baseline[0],
        recall_of_evidence=baseline[1],
    )


def _is_early(planted: Planted) -> bool:
    return planted.rank is not None and planted.rank <= TOP


def _measure(planted: Sequence[Planted], listed: Sequence[Listed]) -> tuple[float, float]:
    """Precision and recall of the first rows."""
    learned = [each for each in planted if each.learned]
    true = {
        (_class_of(each.failure), latent) for each in learned for latent in each.latents.tolist()
    }
    first = listed[:TOP]
    hits = sum((row.class_name, row.latent) in true for row in first)
    n_early = sum(_is_early(each) for each in learned)
    return hits / max(len(first), 1), n_early / max(len(learned), 1)


def _find(
    listed: Sequence[Listed],
    failure: Failure,
    learned: bool,
    activations: Float[Tensor, "image latent"],
    has_factor: Bool[Tensor, " image"],
) -> Planted:
    latents = latents_of(activations, has_factor, at_least=CARRIES_AUROC)
    wanted = {(_class_of(failure), latent) for latent in latents.tolist()}
    for rank, row in enumerate(listed, start=1):
        if (row.class_name, row.latent) in wanted:
            return Planted(failure, learned, latents, rank, row.kind)
    return Planted(failure, learned, latents, None, "")


def _class_of(failure: Failure) -> str:
    """The class whose prompt the failure is about, as the list of nouns calls it."""
    return failure.prompt.removeprefix("a ")


def _kinds(planted: Sequence[Planted]) -> list[str]:
    """polysemous_word, compound_noun, ...: names of failures without what they are about."""
    names = (each.failure.name for each in planted)
    return list(dict.fromkeys("_".join(name.split("_")[:2]) for name in names))

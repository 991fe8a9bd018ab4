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

from clipattr.errors import DataError
from clipattr.jobs.world_scorecard import latents_of
from clipattr.runs import read_json
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
    """pairs that shuffled latents give"""


class FoundList(NamedTuple):
    """What the job atlas found."""

    rows: list[Listed]
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
    return FoundList(listed, metrics["atlas"]["unexpected"]["by_chance"])


def grade_list(
    found: FoundList,
    failures: Sequence[tuple[Failure, bool]],
    *,
    activations: Float[Tensor, "image latent"],
    shows_factor: Sequence[Bool[Tensor, " image"]],
    shows_class: Sequence[Bool[Tensor, " image"]],
) -> Grade:
    """Of the failures with whether the model learned each, and their masks over the images."""
    listed = found.rows
    planted = [
        _find(listed, failure, learned, activations[~of_class], has_factor[~of_class])
        for (failure, learned), has_factor, of_class in zip(
            failures, shows_factor, shows_class, strict=True
        )
    ]
    true = {
        (_class_of(each.failure), latent)
        for each in planted
        if each.learned
        for latent in each.latents.tolist()
    }
    first = listed[:TOP]
    hits = sum((row.class_name, row.latent) in true for row in first)
    learned = [each for each in planted if each.learned]
    early = [each for each in learned if each.rank is not None and each.rank <= TOP]
    return Grade(
        planted=planted,
        precision=hits / len(first) if first else 0.0,
        recall=len(early) / len(learned) if learned else 0.0,
        kinds_learned=_kinds(learned),
        kinds_found=_kinds(early),
        n_graded=TOP,
        n_listed=len(listed),
        n_by_chance=found.n_by_chance,
    )


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

"""The list of unexpected reliance graded against a small truth, by hand."""

import torch

from clipattr.jobs.world_unexpected import FoundList, Listed, grade_list
from clipattr.world.prompts import Failure, planted_failures

FAILURES = {failure.name: failure for failure in planted_failures()}
BOAT, LIGHTNING = FAILURES["spurious_context"], FAILURES["polysemous_word_lightning"]
STAR, HEXNUT = FAILURES["compound_noun_star"], FAILURES["polysemous_word_hexnut"]


def grade(listed: list[Listed], failures: list[tuple[Failure, bool]]):
    """Four images: latent 0 carries the factor of the first failure, latent 1 of all others."""
    activations = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    first = torch.tensor([True, True, False, False])
    nothing = torch.zeros(4, dtype=torch.bool)
    return grade_list(
        FoundList(listed, listed[:1], 1.5),
        failures,
        activations=activations,
        shows_factor=[first, *([~first] * (len(failures) - 1))],
        shows_class=[nothing] * len(failures),
    )


def test_ranks_precision_and_recall() -> None:
    listed = [
        Listed("fish", 0, "unclear"),
        Listed("boat", 0, "context"),
        Listed("bolt", 0, "another sense"),
        Listed("boat", 1, "unclear"),
    ]
    found = grade(listed, [(BOAT, True), (LIGHTNING, True), (HEXNUT, False)])
    assert [each.rank for each in found.planted] == [2, None, None]
    assert found.planted[0].kind == "context"
    assert found.planted[0].latents.tolist() == [0]
    assert found.precision == 1 / 4
    assert found.recall == 1 / 2
    assert found.kinds_learned == ["spurious_context", "polysemous_word"]
    assert found.kinds_found == ["spurious_context"]
    assert (found.n_listed, found.n_graded, found.n_by_chance) == (4, 20, 1.5)
    # The baseline has the first row alone, which is no planted pair.
    assert (found.precision_of_evidence, found.recall_of_evidence) == (0, 0)


def test_what_was_not_learned_counts_neither_way() -> None:
    found = grade([Listed("boat", 0, "context")], [(BOAT, False), (STAR, True)])
    assert found.planted[0].rank == 1
    assert (found.precision, found.recall) == (0.0, 0.0)


def test_a_kind_is_found_with_one_of_its_failures() -> None:
    found = grade([Listed("bolt", 1, "x")], [(BOAT, True), (LIGHTNING, True), (HEXNUT, True)])
    assert found.kinds_found == ["polysemous_word"]
    assert found.recall == 2 / 3


def test_pairs_behind_the_first_twenty_are_ranked_and_not_counted() -> None:
    listed = [*([Listed("fish", 1, "unclear")] * 20), Listed("boat", 0, "context")]
    found = grade(listed, [(BOAT, True)])
    assert found.planted[0].rank == 21
    assert (found.precision, found.recall, found.n_listed) == (0.0, 0.0, 21)


def test_images_of_the_class_itself_say_nothing() -> None:
    # Latent 0 carries the factor, and fires on the class as well: with the images of the class
    # latent 1 would separate the factor better (5 / 6 against 2 / 3).
    activations = torch.tensor([[1.0, 0.5], [0.0, 0.9], [0.0, 0.0], *([[1.0, 0.0]] * 4)])
    factor = torch.tensor([True, *([False] * 6)])
    of_class = torch.tensor([*([False] * 3), *([True] * 4)])
    found = grade_list(
        FoundList([Listed("star fish", 0, "x")], [], 0.0),
        [(STAR, True)],
        activations=activations,
        shows_factor=[factor],
        shows_class=[of_class],
    )
    assert found.planted[0].latents.tolist() == [0]
    assert found.recall == 1


def test_an_empty_list_finds_nothing() -> None:
    found = grade([], [(BOAT, True)])
    assert (found.precision, found.recall, found.kinds_found) == (0.0, 0.0, [])

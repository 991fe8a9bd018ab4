"""Unexpected reliance against plain loops, its null, and planted pairs that have to be found."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.codes import SparseCodes
from clipattr.semantics.kinds import Evidence, Kind, suggest_kinds
from clipattr.semantics.permutation import shuffle_latents
from clipattr.semantics.unexpected import (
    Candidates,
    Meanings,
    compare,
    evidence_threshold,
    find_candidates,
    find_parts,
    first_of_each_latent,
    judge,
    speaking_for,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_candidates(reliance: Tensor) -> dict[tuple[int, int], tuple[float, float]]:
    rows = reliance.tolist()
    n_classes, n_latents = reliance.shape
    found = {}
    for latent in range(n_latents):
        column = [rows[number][latent] for number in range(n_classes)]
        mean = sum(column) / n_classes
        spread = math.sqrt(sum((value - mean) ** 2 for value in column) / (n_classes - 1))
        for number, value in enumerate(column):
            if value > 0 and value >= max(column) / 2 and value > mean:
                positive = sum(max(other, 0) for other in rows[number])
                found[number, latent] = value / positive, (value - mean) / spread
    return found


@pytest.mark.parametrize("n_entries", [2**23, 12])
def test_candidates_are_those_of_a_plain_loop(
    n_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipattr.semantics.unexpected._ENTRIES", n_entries)
    reliance = drawn(5, 40)
    found = find_candidates(reliance, speaking_for(reliance))
    expected = plain_candidates(reliance)
    pairs = list(zip(found.classes.tolist(), found.latents.tolist(), strict=True))
    assert set(pairs) == set(expected)
    assert len(pairs) == len(expected) > 20
    for row, pair in enumerate(pairs):
        share, specificity = expected[pair]
        assert float(found.share[row]) == pytest.approx(share, rel=1e-12)
        assert float(found.specificity[row]) == pytest.approx(specificity, rel=1e-12)
        assert float(found.evidence[row]) == pytest.approx(share * specificity, rel=1e-12)
        assert float(found.attribution[row]) == float(reliance[pair])


def test_a_class_that_nothing_speaks_for_has_no_candidate() -> None:
    reliance = torch.tensor([[-1.0, -2.0], [1.0, 3.0], [0.0, 0.0]])
    found = find_candidates(reliance, speaking_for(reliance))
    assert found.classes.tolist() == [1, 1]
    assert found.share.tolist() == pytest.approx([0.25, 0.75])


def test_parts_are_whole_words_of_a_longer_name() -> None:
    names = ["star fish", "Fish", "starfish", "sea star fish"]
    words = ["fish", "star", "star fish", "FISH", "sta"]
    expected = [
        [True, True, False, True, False],
        [False, False, False, False, False],
        [False, False, False, False, False],
        [True, True, True, True, False],
    ]
    assert find_parts(names, words).tolist() == expected


def test_compare_is_a_mean_over_its_standard_error() -> None:
    embeddings, n = drawn(30, 6), 5
    examples = torch.tensor([[0, 4, 9, 20, 29], [3, 7, 8, -1, -1], [2, -1, -1, -1, -1]])
    one, other = normalize(drawn(3, 6, seed=1), dim=1), normalize(drawn(3, 6, seed=2), dim=1)
    found = compare(embeddings, examples, towards=one, away=other)
    for row in range(2):
        rows = [number for number in examples[row].tolist() if number >= 0]
        units = [embeddings[number] / embeddings[number].norm() for number in rows]
        values = torch.stack([unit @ one[row] - unit @ other[row] for unit in units])
        error = values.std() / len(rows) ** 0.5
        assert float(found.mean[row]) == pytest.approx(float(values.mean()))
        assert float(found.sigmas[row]) == pytest.approx(float(values.mean() / error))
    assert n == examples.shape[1]
    assert math.isnan(found.mean[2])
    assert math.isnan(found.sigmas[2])


def test_the_same_text_twice_leaves_no_gap() -> None:
    text = normalize(drawn(1, 6), dim=1)
    found = compare(drawn(4, 6), torch.tensor([[0, 1, 2, 3]]), towards=text, away=text)
    assert found.sigmas.tolist() == [0.0]


def test_compare_of_no_rows() -> None:
    nothing = torch.zeros(0, 6)
    found = compare(
        drawn(4, 6), torch.zeros(0, 3, dtype=torch.int64), towards=nothing, away=nothing
    )
    assert found.mean.shape == found.sigmas.shape == (0,)


def planted() -> Meanings:
    """Three words along axes; latents of word 0, word 1, and of both."""
    axes = torch.eye(4, dtype=torch.float64)
    noise = 0.02 * drawn(30, 4)
    centres = torch.cat([axes[:1].expand(10, -1), axes[1:2].expand(10, -1)])
    centres = torch.cat([centres, (axes[:1] + 0.7 * axes[1:2]).expand(10, -1)])
    return Meanings(
        embeddings=centres + noise,
        examples=torch.arange(30).view(3, 10),
        labels=torch.tensor([[0, 2], [1, 2], [0, 1]]),
        label_scores=torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.8, 0.6]], dtype=torch.float64),
        words=axes[:3],
        classes=torch.stack([axes[0], axes[1]]),
        has_part=torch.tensor([[False, True, False], [False, False, False]]),
    )


def candidates(pairs: list[tuple[int, int]]) -> Candidates:
    ones = torch.ones(len(pairs), dtype=torch.float64)
    numbers = torch.tensor(pairs)
    return Candidates(numbers[:, 0], numbers[:, 1], ones, ones, ones)


def test_another_word_that_is_nearer_is_unexpected_and_the_class_itself_is_not() -> None:
    verdict = judge(candidates([(0, 0), (1, 0), (0, 1), (1, 1)]), planted())
    assert verdict.is_unexpected.tolist() == [False, True, True, False]
    assert verdict.gap[1] == pytest.approx(1, abs=0.1)


def test_a_label_that_is_a_part_of_the_name_is_unexpected_where_it_counts() -> None:
    # Latent 2 means class 0, and its second label is a part of that name; of latent 0 it is not.
    verdict = judge(candidates([(0, 2), (0, 0), (1, 2)]), planted())
    assert verdict.part.tolist() == [1, -1, -1]
    assert verdict.is_unexpected.tolist() == [True, False, True]
    weak = planted()
    weak.label_scores[2, 1] = 0.25
    assert judge(candidates([(0, 2)]), weak).part.tolist() == [-1]


def test_a_latent_without_examples_is_not_unexpected() -> None:
    meanings = planted()
    meanings.examples[1], meanings.labels[1] = -1, -1
    meanings.label_scores[1] = torch.nan
    assert judge(candidates([(0, 1)]), meanings).is_unexpected.tolist() == [False]


@pytest.mark.parametrize("seed", range(3))
def test_each_latent_counts_once_by_its_strongest_pair(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randint(0, 12, (40,), generator=generator)
    evidence = drawn(40, seed=seed).abs().round(decimals=1)  # with ties
    found = first_of_each_latent(latents, evidence)
    expected = set()
    for latent in set(latents.tolist()):
        rows = [row for row in range(40) if int(latents[row]) == latent]
        expected.add(max(rows, key=lambda row: (float(evidence[row]), -row)))
    assert set(found.nonzero().flatten().tolist()) == expected


def test_no_pair_has_no_first() -> None:
    nothing = torch.zeros(0)
    assert first_of_each_latent(nothing.long(), nothing.double()).shape == (0,)


def plain_threshold(found: list[float], chance: list[list[float]], level: float) -> float:
    allowed = []
    for value in found:
        by_chance = sum(each >= value for row in chance for each in row) / len(chance)
        if by_chance <= level * sum(each >= value for each in found):
            allowed.append(value)
    return min(allowed, default=math.inf)


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_is_the_lowest_that_chance_allows(seed: int) -> None:
    found = drawn(200, seed=seed).abs().round(decimals=2) * 2
    chance = [drawn(150, seed=100 + seed + number).abs().round(decimals=2) for number in range(3)]
    threshold = evidence_threshold(found, chance, level=0.1)
    lowest = plain_threshold(found.tolist(), [row.tolist() for row in chance], 0.1)
    assert threshold.evidence == lowest
    assert threshold.n_found == int((found >= lowest).sum())
    by_chance = sum(int((row >= lowest).sum()) for row in chance) / 3
    assert threshold.n_by_chance == pytest.approx(by_chance)
    assert threshold.false_discovery_rate <= 0.1


def test_nothing_is_kept_where_chance_does_as_well() -> None:
    values = drawn(50).abs()
    threshold = evidence_threshold(values, [values + 0.1], level=0.05)
    assert (threshold.evidence, threshold.n_found) == (math.inf, 0)
    assert threshold.false_discovery_rate == 0
    assert evidence_threshold(values[:0], [values], level=0.05).n_found == 0


@pytest.mark.parametrize("n_latents", [1, 7, 512, 30_000])
def test_every_image_has_a_permutation_of_its_own(n_latents: int) -> None:
    every = torch.arange(n_latents).expand(4, -1)
    images = torch.tensor([3, 4, 1_000_000_007, 0])
    codes = SparseCodes(every, torch.rand(4, n_latents), n_latents)
    found = shuffle_latents(codes, images, seed=5)
    assert (found.indices.sort(dim=1).values == every).all()
    assert (found.values == codes.values).all()
    if n_latents > 7:
        assert not (found.indices[0] == found.indices[1]).all()
        assert not (shuffle_latents(codes, images, seed=6).indices == found.indices).all()
    # Whatever the batch, and for all tokens of an image alike.
    alone = shuffle_latents(codes.select(torch.tensor([2])), images[2:3], seed=5)
    assert (alone.indices == found.indices[2]).all()
    tokens = SparseCodes(every[:2, None].expand(-1, 3, -1), torch.rand(2, 3, n_latents), n_latents)
    of_tokens = shuffle_latents(tokens, images[:2], seed=5).indices
    assert (of_tokens == found.indices[:2, None]).all()


def test_a_latent_is_sent_everywhere_alike() -> None:
    n_images, n_latents = 20_000, 10
    codes = SparseCodes(torch.full((n_images, 1), 3), torch.ones(n_images, 1), n_latents)
    found = shuffle_latents(codes, torch.arange(n_images), seed=0)
    counts = found.indices.flatten().bincount(minlength=n_latents)
    # Binomial with a mean of 2,000 and a standard deviation of 42.
    assert (counts - 2000).abs().max() < 5 * 42


KNOWN = Evidence(
    class_name="bolt",
    label="drop",
    label_is_class=True,
    part=None,
    written_sigmas=-3.0,
    alignment=0.2,
    aligned_share=0.1,
    counterpart=4,
    counterpart_cosine=0.1,
    lift=3.0,
    share_of_class=0.2,
)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, [Kind.polysemy, Kind.similar]),
        ({"part": "star"}, [Kind.compound, Kind.polysemy, Kind.similar]),
        ({"written_sigmas": 2.5}, [Kind.typography, Kind.polysemy, Kind.similar]),
        ({"written_sigmas": math.nan}, [Kind.polysemy, Kind.similar]),
        ({"aligned_share": 0.2}, [Kind.similar]),
        ({"alignment": -0.1}, [Kind.similar]),
        ({"counterpart": None}, [Kind.similar]),
        ({"counterpart_cosine": 0.9}, [Kind.similar]),
        ({"aligned_share": 0.5, "label_is_class": False}, [Kind.context]),
        ({"aligned_share": 0.5, "label_is_class": False, "lift": 1.2}, [Kind.unclear]),
        ({"aligned_share": 0.5, "label_is_class": False, "share_of_class": 0.9}, [Kind.unclear]),
        ({"aligned_share": 0.5, "label_is_class": False, "lift": None}, [Kind.unclear]),
    ],
)
def test_each_rule_holds_where_its_numbers_do(changes: dict, kinds: list[Kind]) -> None:
    found = suggest_kinds(KNOWN._replace(**changes))
    assert [each.kind for each in found] == kinds
    assert all(each.reason for each in found)


def test_the_numbers_of_a_rule_stand_in_its_reason() -> None:
    context = KNOWN._replace(aligned_share=0.5, label_is_class=False, label="sea")
    assert "'sea'" in suggest_kinds(context)[0].reason
    assert "3.0 times" in suggest_kinds(context)[0].reason
    assert "20 %" in suggest_kinds(context)[0].reason
    assert "latent 4 (cosine 0.10)" in suggest_kinds(KNOWN)[0].reason

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
    Texts,
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


def test_compare_is_a_mean_over_its_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipattr.semantics.unexpected._PAIRS", 2)  # more than one block
    embeddings = drawn(30, 6)
    examples = torch.tensor([[0, 4, 9, 20, 29], [3, 7, 8, -1, -1], [2, -1, -1, -1, -1]])
    texts, latents = drawn(4, 6, seed=1), torch.tensor([1, 0, 2])
    one, other = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 0])
    towards, away = Texts(texts, one), Texts(texts, other)
    found = compare(embeddings, examples, latents, towards=towards, away=away)
    for pair in range(2):
        rows = [number for number in examples[latents[pair]].tolist() if number >= 0]
        direction = texts[one[pair]] - texts[other[pair]]
        values = torch.stack([embeddings[number] @ direction for number in rows])
        error = values.std() / len(rows) ** 0.5
        assert float(found.mean[pair]) == pytest.approx(float(values.mean()))
        assert float(found.sigmas[pair]) == pytest.approx(float(values.mean() / error))
    assert math.isnan(found.mean[2])
    assert math.isnan(found.sigmas[2])


def test_the_same_text_twice_leaves_no_gap() -> None:
    text, first = Texts(drawn(1, 6), torch.tensor([0])), torch.tensor([0])
    found = compare(drawn(4, 6), torch.tensor([[0, 1, 2, 3]]), first, towards=text, away=text)
    assert found.sigmas.tolist() == [0.0]


def test_compare_of_no_pairs() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    texts = Texts(drawn(2, 6), nothing)
    found = compare(drawn(4, 6), torch.tensor([[0, 1]]), nothing, towards=texts, away=texts)
    assert found.mean.shape == found.sigmas.shape == (0,)


def planted(n_images: int = 12) -> Meanings:
    """Four words along axes; latents of word 0, of word 1, and of 0 with some of 1."""
    axes = torch.eye(5, dtype=torch.float64)
    middles = torch.stack([axes[0], axes[1], axes[0] + 0.8 * axes[1], axes[2], axes[3]])
    images = middles.repeat_interleave(n_images, dim=0) + 0.05 * drawn(5 * n_images, 5)
    return Meanings(
        embeddings=normalize(images, dim=1),
        examples=torch.arange(5 * n_images).view(5, n_images)[:3],
        words=axes[:4],
        classes=torch.stack([axes[0], axes[1]]),
        has_part=torch.tensor([[False, True, False, False], [False] * 4]),
    )


def candidates(pairs: list[tuple[int, int]]) -> Candidates:
    ones = torch.ones(len(pairs), dtype=torch.float64)
    numbers = torch.tensor(pairs)
    return Candidates(numbers[:, 0], numbers[:, 1], ones, ones, ones)


def test_another_word_that_is_nearer_is_unexpected_and_the_class_itself_is_not() -> None:
    verdict = judge(candidates([(0, 0), (1, 0), (0, 1), (1, 1)]), planted())
    assert verdict.is_unexpected.tolist() == [False, True, True, False]
    assert verdict.word.tolist() == [0, 0, 1, 1]
    assert verdict.sigmas[0] == verdict.sigmas[3] == 0


def test_the_word_is_chosen_on_one_half_of_the_images_and_tested_on_the_other() -> None:
    meanings = planted()
    # Every other image of latent 0 shows word 1: the half that is tested is against word 0.
    swapped = meanings.examples.clone()
    swapped[0, 1::2] = meanings.examples[1, 1::2]
    found = judge(candidates([(1, 0)]), meanings._replace(examples=swapped))
    assert found.word.tolist() == [0]
    assert float(found.sigmas[0]) < 0
    centred = meanings.embeddings - meanings.embeddings.mean(dim=0)
    direction = meanings.words[0] - meanings.classes[1]
    assert float(found.gap[0]) == pytest.approx(
        float((centred[swapped[0, 1::2]] @ direction).mean())
    )


def test_what_all_images_share_means_nothing() -> None:
    meanings = planted()
    common = torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0], dtype=torch.float64)
    shifted = meanings._replace(embeddings=meanings.embeddings + common)
    pairs = candidates([(0, 0), (1, 0), (0, 1), (0, 2)])
    one, other = judge(pairs, meanings), judge(pairs, shifted)
    assert (one.word == other.word).all()
    torch.testing.assert_close(one.sigmas, other.sigmas)


def test_a_word_that_is_a_part_of_the_name_is_unexpected_where_it_counts() -> None:
    # Latent 2 means class 0, and its second word is a part of that name; of latent 0 it is not.
    verdict = judge(candidates([(0, 2), (0, 0), (1, 2)]), planted())
    assert verdict.part.tolist() == [1, -1, -1]
    assert verdict.is_unexpected.tolist() == [True, False, True]
    meanings = planted()
    tested = meanings.examples.clone()
    tested[2, 1::2] = tested[0, 1::2]  # the other half of its images does not show the part
    assert judge(candidates([(0, 2)]), meanings._replace(examples=tested)).part.tolist() == [-1]


@pytest.mark.parametrize("n_known", [0, 1, 2, 3])
def test_a_latent_with_too_few_examples_is_not_unexpected(n_known: int) -> None:
    meanings = planted()
    meanings.examples[1, n_known:] = -1
    found = judge(candidates([(0, 1)]), meanings)
    assert found.is_unexpected.tolist() == [False]


def test_an_image_that_could_not_be_read_disturbs_nothing() -> None:
    meanings = planted()
    beside = torch.cat([torch.full((1, 5), torch.nan, dtype=torch.float64), meanings.embeddings])
    examples = meanings.examples + 1
    examples[0, -3:] = -1
    pairs = candidates([(0, 0), (1, 0), (0, 1), (0, 2)])
    shorter = meanings.examples.clone()
    shorter[0, -3:] = -1
    one = judge(pairs, meanings._replace(examples=shorter))
    other = judge(pairs, meanings._replace(embeddings=beside, examples=examples))
    torch.testing.assert_close(one.sigmas, other.sigmas)
    assert not other.sigmas.isnan().any()
    drawn_again = meanings._replace(embeddings=beside).without_meaning(3).embeddings
    assert drawn_again[0].isnan().all()
    assert not drawn_again[1:].isnan().any()


def test_without_meaning_every_image_has_the_embedding_of_another() -> None:
    meanings, pairs = planted(), candidates([(1, 0), (0, 1)])
    assert judge(pairs, meanings).is_unexpected.all()
    for seed in range(5):
        drawn_again = meanings.without_meaning(seed)
        assert not torch.equal(drawn_again.embeddings, meanings.embeddings)
        order = [each.embeddings[:, 0].sort().values for each in (drawn_again, meanings)]
        assert torch.equal(*order)
        assert not judge(pairs, drawn_again).is_unexpected.any()


def test_without_meaning_few_latents_are_unexpected() -> None:
    """The nominal rate of 3 standard errors on ten images is 0.7 % (t with nine degrees)."""
    n_latents, n = 2000, 20
    words = normalize(drawn(50, 16), dim=1)
    meanings = Meanings(
        embeddings=normalize(drawn(3000, 16, seed=1) + 2 * words[7], dim=1),
        examples=torch.randint(0, 3000, (n_latents, n), generator=torch.Generator().manual_seed(0)),
        words=words,
        classes=words[:5],
        has_part=torch.zeros(5, 50, dtype=torch.bool),
    )
    pairs = candidates([(latent % 5, latent) for latent in range(n_latents)])
    share = judge(pairs, meanings).is_unexpected.double().mean()
    assert share < 0.02
    again = judge(pairs, meanings.without_meaning(0)).is_unexpected.double().mean()
    assert again < 0.02


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
    shuffle_latents(codes, images, seed=2**32)  # of any size
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

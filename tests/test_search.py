"""Latents for a question, against a plain loop in float64; and how an answer is shown."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.data.thumbnails import thumbnail_name
from clipattr.report.search import FoundAnswer, FoundLatent, search_table
from clipattr.report.search_picture import search_png
from clipattr.semantics.search import find_latents, likeness

N, D, DEAD = 40, 12, (3, 17, 39)


def make_means(seed: int = 0) -> Tensor:
    """Around a direction that all share, as embeddings of images are; three latents are dead."""
    generator = torch.Generator().manual_seed(seed)
    shared = 3 * torch.randn(D, generator=generator)
    means = 0.3 * normalize(torch.randn(N, D, generator=generator) + shared, dim=1)
    means[list(DEAD)] = torch.nan
    return means


def make_query(seed: int) -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.hypot(*one) / math.hypot(*other)


def unit(row: list[float]) -> list[float]:
    return [value / math.hypot(*row) for value in row]


def plain_scores(means: Tensor, query: Tensor, reference: Tensor | None) -> dict[int, float]:
    rows = {number: row.tolist() for number, row in enumerate(means) if number not in DEAD}
    asked = query.tolist()
    if reference is not None:
        shared = reference.tolist()
        return {j: cosine(row, asked) - cosine(row, shared) for j, row in rows.items()}
    units = {j: unit(row) for j, row in rows.items()}
    middle = [sum(row[axis] for row in units.values()) / len(units) for axis in range(D)]
    minus = [a - m for a, m in zip(unit(asked), middle, strict=True)]
    return {
        j: cosine([a - m for a, m in zip(row, middle, strict=True)], minus)
        for j, row in units.items()
    }


@pytest.mark.parametrize("by_text", [True, False])
@pytest.mark.parametrize("top", [1, 5, 30, 100])
def test_equals_a_plain_loop(by_text: bool, top: int):
    means, query = make_means(), make_query(1)
    reference = make_query(2) if by_text else None
    scores = plain_scores(means, query, reference)
    ordered = sorted(scores, key=lambda latent: -scores[latent])
    found = find_latents(means, query, reference, top)
    assert found.most.latents.tolist() == ordered[:top]
    assert found.least.latents.tolist() == ordered[top:][::-1][:top]
    for ranked in found:
        expected = [scores[latent] for latent in ranked.latents.tolist()]
        np.testing.assert_allclose(ranked.scores, expected, atol=1e-6)
    listed = [*found.most.latents.tolist(), *found.least.latents.tolist()]
    assert len(set(listed)) == len(listed) == min(2 * top, N - len(DEAD))


def test_a_latent_is_not_like_itself():
    means = make_means()
    found = find_latents(means, means[5], top=100, without=5)
    scores = plain_scores(means, means[5], None)
    assert scores.pop(5) == pytest.approx(1.0)
    assert found.most.latents.tolist() == sorted(scores, key=lambda latent: -scores[latent])
    assert float(likeness(means, means[5])[5]) == pytest.approx(1.0)
    assert not torch.isnan(means[5]).any(), "the means are left as they were"


def test_what_all_means_share_ranks_none_of_them():
    """By the cosine alone the latent in the middle of the cone would win; it has no say."""
    shared = torch.zeros(D)
    shared[0] = 1.0
    offsets = 0.2 * torch.eye(D)[1:6]
    # In pairs around the middle, and the last in the middle itself.
    means = torch.cat([shared + offsets, shared - offsets, shared[None]])
    query = shared + 0.05 * torch.eye(D)[2]
    assert int(normalize(means, dim=1).mv(query).argmax()) == 10
    found = find_latents(means, query, top=1)
    assert found.most.latents.tolist() == [1]
    assert found.least.latents.tolist() == [6]


def test_how_much_images_are_alike_has_no_say():
    means = make_means()
    lengths = torch.linspace(0.1, 1.0, N)[:, None]
    torch.testing.assert_close(
        likeness(means, make_query(1)), likeness(lengths * means, 3 * make_query(1)), equal_nan=True
    )


def test_equal_scores_are_listed_by_number():
    means = make_query(0).repeat(6, 1)
    found = find_latents(means, make_query(1), make_query(2), top=3)
    assert found.most.latents.tolist() == [0, 1, 2]
    assert found.least.latents.tolist() == [5, 4, 3]


def test_nothing_fired():
    found = find_latents(torch.full((4, D), torch.nan), make_query(1), top=2)
    assert len(found.most.latents) == len(found.least.latents) == 0


def latent(number: int, examples: list[int], share: float | None = 0.125) -> FoundLatent:
    labels = [("a $word", 0.5), ("other", 0.25)]
    return FoundLatent(number, 0.123456, labels, share, examples, None)


def test_table_and_numbers():
    answer = FoundAnswer(
        '"sea"', {"query": "sea"}, "cosine", [latent(7, [1])], [latent(9, [], None)]
    )
    lines = search_table(answer).splitlines()
    assert lines[0] == '"sea"; score: cosine'
    assert lines[3].split() == ["1", "7", "+0.123", "12.5", "%", "a", "$word", "other"]
    assert lines[5].split() == ["1", "9", "+0.123", "-", "a", "$word", "other"]
    written = answer.to_json()
    assert written["query"] == "sea"
    assert written["most"] == [
        {
            "latent": 7,
            "score": 0.123456,
            "labels": [{"word": "a $word", "score": 0.5}, {"word": "other", "score": 0.25}],
            "share_of_images": 0.125,
            "examples": [1],
            "page": None,
        }
    ]


def test_picture_shows_the_thumbnails_that_are_there(tmp_path):
    """Red in the row of the first latent on the left, blue on the right, and nothing else."""
    for row, colour in ((1, "red"), (1002, "blue")):
        path = tmp_path / thumbnail_name(row)
        path.parent.mkdir()
        Image.new("RGB", (112, 60), colour).save(path, quality=95)
    most, least = [latent(7, [5, 1]), latent(8, [])], [latent(9, [1002, 1, 1])]
    answer = FoundAnswer('"$sea"', {}, "cosine", most, least)
    asked = torch.zeros(3, 8, 8, dtype=torch.uint8)
    asked[1] = 255
    content = search_png([answer, answer], tmp_path, n_examples=2, asked=asked)
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    strong = pixels.max(axis=2) - pixels.min(axis=2) > 200
    main = pixels.argmax(axis=2)
    middle = pixels.shape[1] / 2
    places = {
        name: np.nonzero(strong & (main == channel))[1]
        for channel, name in enumerate(("red", "green", "blue"))
    }
    # Row 5 has no file and stays empty: the red of row 1 stands in the second place.
    assert (places["red"] < middle).any()
    assert (places["red"] > middle).any()
    assert (places["blue"] > middle).all()
    assert len(places["blue"]) > 1000
    assert (places["green"] > 1.7 * middle).all()
    assert len(places["green"]) > 100

"""Labels of large vocabularies, two means, redundancy, map: against loops and scikit-learn."""

from itertools import product

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch.nn.functional import normalize

from clipattr.errors import ConfigError
from clipattr.semantics import directions, labels, two_means
from clipattr.semantics.clarity import clarity
from clipattr.semantics.describe import describe_latents
from clipattr.semantics.directions import direction_map, nearest_directions
from clipattr.semantics.labels import label_scores, semantic_mean, top_labels


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 3])
def test_top_labels_in_blocks_equal_a_full_sort(monkeypatch: pytest.MonkeyPatch, n: int):
    monkeypatch.setattr(labels, "_LATENTS", 4)
    # The last block has one word only, fewer than are asked for.
    monkeypatch.setattr(labels, "_LABELS", 8)
    means, texts, empty = draw(11, 6), 3 * draw(25, 6, seed=1), 5 * draw(6, seed=2)
    means[5] = torch.nan
    found = top_labels(means, texts, empty, n=n)
    scores, order = label_scores(means, texts, empty).sort(dim=1, descending=True)
    alive = torch.arange(11) != 5
    assert torch.equal(found.labels[alive], order[alive, :n])
    torch.testing.assert_close(found.scores[alive], scores[alive, :n])
    torch.testing.assert_close(found.margin[alive], scores[alive, 0] - scores[alive, 1])
    assert found.labels[5].tolist() == [-1] * n
    assert found.scores[5].isnan().all()
    assert found.margin[5].isnan()


def test_more_labels_than_words_is_an_error():
    with pytest.raises(ConfigError, match="5 labels of a vocabulary of 4"):
        top_labels(draw(2, 3), draw(4, 3), draw(3))


def planted_heaps(n_latents: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images near one of two directions of each latent; examples with padding; the truth."""
    truth = (draw(n_latents, 20, seed=1) > 0).long()
    truth[:, 0] = 0
    truth[:, 1] = 1
    centres = draw(n_latents, 2, 16, seed=2)
    images = centres.gather(1, truth[..., None].expand(-1, -1, 16)) + 0.3 * draw(n_latents, 20, 16)
    examples = torch.arange(n_latents * 20).view(n_latents, 20)
    examples[0, 13:] = truth[0, 13:] = -1
    return images.flatten(0, 1) * 7, examples, truth


def k_means(points: torch.Tensor, n_starts: int) -> KMeans:
    return KMeans(2, n_init=n_starts, random_state=0).fit(points.numpy())


def test_two_means_find_planted_heaps_as_scikit_learn_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(two_means, "_BLOCK", 3 * 20 * 20)
    embeddings, examples, truth = planted_heaps(8)
    found = two_means.two_means(embeddings, examples)
    assert torch.equal(found.clusters, truth)
    for latent in range(8):
        points = normalize(embeddings[examples[latent][examples[latent] >= 0]], dim=1)
        wanted = k_means(points, 10)
        one, two = torch.from_numpy(wanted.cluster_centers_)
        expected = 1 - torch.cosine_similarity(one, two, dim=0).item()
        assert found.polysemanticity[latent].item() == pytest.approx(expected, abs=1e-9)
        inside = truth[latent][truth[latent] >= 0]
        assert found.sizes[latent].tolist() == torch.bincount(inside).tolist()


def sum_of_squares(points: torch.Tensor, clusters: torch.Tensor) -> float:
    heaps = [points[clusters == c] for c in (0, 1)]
    return sum(float((heap - heap.mean(0)).square().sum()) for heap in heaps if len(heap))


def test_two_means_of_one_heap_are_as_tight_as_those_of_scikit_learn():
    """Noise has many local optima: no worse than the best of ten starts, on average."""
    embeddings = draw(30 * 20, 8, seed=3)
    examples = torch.arange(30 * 20).view(30, 20)
    found = two_means.two_means(embeddings, examples)
    ours, theirs = [], []
    for latent in range(30):
        points = normalize(embeddings[examples[latent]], dim=1)
        clusters = found.clusters[latent]
        ours.append(sum_of_squares(points, clusters))
        centres = torch.stack([points[clusters == c].mean(0) for c in (0, 1)])
        assert torch.equal(torch.cdist(points, centres).argmin(1), clusters)
        assert clusters[0] == 0
        theirs.append(k_means(points, 10).inertia_)
    assert np.mean(ours) <= np.mean(theirs) * 1.001


def test_two_means_of_few_points_are_the_best_of_all_splits():
    embeddings, examples = draw(6, 3, seed=4), torch.arange(6)[None]
    points = normalize(embeddings, dim=1)
    found = two_means.two_means(embeddings, examples)
    splits = [torch.tensor([0, *rest]) for rest in product((0, 1), repeat=5)]
    best = min(splits, key=lambda split: sum_of_squares(points, split))
    assert torch.equal(found.clusters[0], best)


def test_two_means_of_no_one_two_and_equal_examples():
    embeddings = torch.cat([torch.ones(3, 4), torch.eye(4)]).double()
    examples = torch.tensor([[-1, -1, -1], [3, -1, -1], [3, 0, -1], [0, 1, 2]])
    found = two_means.two_means(embeddings, examples)
    # cos(e1, (1, 1, 1, 1)) = 1 / 2
    expected = torch.tensor([torch.nan, torch.nan, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.polysemanticity, expected, equal_nan=True)
    assert found.clusters.tolist() == [[-1, -1, -1], [0, -1, -1], [0, 1, -1], [0, 0, 0]]
    assert found.sizes.tolist() == [[0, 0], [1, 0], [1, 1], [3, 0]]


def test_padding_of_two_means_changes_nothing():
    """What is gathered in its place is the first image, which is an example of no latent here."""
    embeddings = draw(300 * 12 + 1, 4, seed=8)
    examples = 1 + torch.arange(300 * 12).view(300, 12)
    alone = two_means.two_means(embeddings, examples)
    padded = torch.nn.functional.pad(examples, (0, 7), value=-1)
    found = two_means.two_means(embeddings, padded)
    torch.testing.assert_close(found.polysemanticity, alone.polysemanticity)
    assert torch.equal(found.clusters[:, :12], alone.clusters)
    assert torch.equal(found.sizes, alone.sizes)
    assert (found.clusters[:, 12:] == -1).all()


def test_polysemanticity_is_one_minus_clarity_of_the_centres():
    embeddings, examples, truth = planted_heaps(2)
    found = two_means.two_means(embeddings, examples)
    units = normalize(embeddings, dim=1)
    centres = torch.stack([units[examples[1]][truth[1] == c].mean(0) for c in (0, 1)])
    expected = 1 - clarity(centres, torch.tensor([[0, 1]]))
    torch.testing.assert_close(found.polysemanticity[1:], expected)


def test_nearest_directions_equal_a_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(directions, "_BLOCK", 4)
    W_dec = draw(13, 5) * torch.logspace(-2, 2, 13)[:, None].double()
    found = nearest_directions(W_dec)
    largest = []
    for one in range(13):
        cosines = [
            torch.cosine_similarity(W_dec[one], W_dec[two], dim=0).item() if two != one else -2
            for two in range(13)
        ]
        largest.append(max(cosines))
        assert found.latent[one].item() == cosines.index(max(cosines))
        assert found.cosine[one].item() == pytest.approx(max(cosines), abs=1e-12)
    assert found.redundancy == pytest.approx(sum(largest) / 13)
    with pytest.raises(ValueError, match="needs two"):
        nearest_directions(W_dec[:1])


def test_direction_map_is_the_pca_of_scikit_learn():
    W_dec = draw(40, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.5, 0.2])
    found = direction_map(W_dec)
    wanted = PCA(2).fit(normalize(W_dec, dim=1).numpy())
    expected = torch.from_numpy(wanted.transform(normalize(W_dec, dim=1).numpy()))
    signs = torch.tensor(
        [np.sign(axis[np.abs(axis).argmax()]) for axis in wanted.components_], dtype=torch.float64
    )
    torch.testing.assert_close(found.positions, expected * signs)
    torch.testing.assert_close(found.shares, torch.from_numpy(wanted.explained_variance_ratio_))


def test_describe_latents_puts_the_columns_together():
    embeddings, examples, _ = planted_heaps(4)
    texts, empty, W_dec = draw(9, 16, seed=5), draw(16, seed=6), draw(4, 6, seed=7)
    found = describe_latents(
        embeddings=embeddings,
        examples=examples,
        W_dec=W_dec,
        texts=texts,
        empty_text=empty,
        n_labels=2,
    )
    assert found.n_examples.tolist() == [13, 20, 20, 20]
    scores = label_scores(semantic_mean(embeddings, examples), texts, empty)
    assert torch.equal(found.labels, scores.topk(2, dim=1).indices)
    torch.testing.assert_close(found.clarity, clarity(embeddings, examples))
    assert torch.equal(found.nearest_latent, nearest_directions(W_dec).latent)
    assert torch.equal(found.position, direction_map(W_dec).positions)
    assert torch.equal(found.map_shares, direction_map(W_dec).shares)
    assert all(len(column) == 4 for column in found if column is not found.map_shares)

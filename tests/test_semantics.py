import pytest
import torch

from clipattr.semantics.clarity import clarity
from clipattr.semantics.labels import alignment, best_label, label_scores, semantic_mean

# Latent 2 has fewer examples than asked for, latent 3 one, latent 4 none.
EXAMPLES = torch.tensor([[0, 1, 2], [3, 5, 7], [4, 6, -1], [8, -1, -1], [-1, -1, -1]])


@pytest.fixture
def embeddings() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1.0, 100.0, 0.01]).repeat(3)[:, None]
    return (torch.randn(9, 4, generator=generator) * lengths).double()


def plain_mean(embeddings: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return torch.stack([embeddings[i] / embeddings[i].norm() for i in ids]).sum(0) / len(ids)


def plain_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def examples_of(latent: int) -> list[int]:
    return [i for i in EXAMPLES[latent].tolist() if i >= 0]


def test_semantic_mean_equals_plain_loop(embeddings: torch.Tensor):
    means = semantic_mean(embeddings, EXAMPLES)
    for latent in range(4):
        torch.testing.assert_close(means[latent], plain_mean(embeddings, examples_of(latent)))
    assert means[4].isnan().all()


def test_label_scores_equal_plain_loop(embeddings: torch.Tensor):
    generator = torch.Generator().manual_seed(1)
    texts = 3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    empty = 5 * torch.randn(4, generator=generator, dtype=torch.float64)
    means = semantic_mean(embeddings, EXAMPLES)
    scores = label_scores(means, texts, empty)
    for latent in range(4):
        for label in range(6):
            expected = plain_cosine(means[latent], texts[label]) - plain_cosine(
                means[latent], empty
            )
            assert scores[latent, label].item() == pytest.approx(expected, abs=1e-12)
    assert scores[4].isnan().all()
    torch.testing.assert_close(alignment(means, texts[:2], empty)[:4], scores[:4, :2])


def test_best_label():
    nan = float("nan")
    best = best_label(torch.tensor([[0.1, 0.7, 0.2], [0.3, -0.5, 0.2], [nan, nan, nan]]))
    assert best.label.tolist() == [1, 0, -1]
    torch.testing.assert_close(best.score, torch.tensor([0.7, 0.3, nan]), equal_nan=True)


def test_clarity_is_the_mean_pairwise_cosine(embeddings: torch.Tensor):
    values = clarity(embeddings, EXAMPLES)
    for latent in range(3):
        ids = examples_of(latent)
        pairs = [plain_cosine(embeddings[a], embeddings[b]) for a in ids for b in ids if a != b]
        assert values[latent].item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert values[3:].isnan().all()


def test_clarity_of_equal_and_of_orthogonal_examples():
    embeddings = torch.cat([2 * torch.ones(3, 4), 3 * torch.eye(4)]).double()
    values = clarity(embeddings, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0], dtype=torch.float64))

"""Rank agreement and AUROC against scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

from clipattr.errors import DataError
from clipattr.metrics.ranks import auroc, average_ranks, pearson, spearman, top_overlap


@pytest.fixture
def rankings() -> tuple[Tensor, Tensor, Tensor]:
    """Two related rows of numbers per image with many ties, and a mask of 6 to 12 of 12 slots."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-4, 5, (20, 12), generator=generator).double()
    b = a + torch.randint(-3, 4, (20, 12), generator=generator).double()
    n_active = torch.randint(6, 13, (20, 1), generator=generator)
    mask = torch.rand(20, 12, generator=generator).argsort(dim=1) < n_active
    return a, b, mask


@pytest.mark.parametrize(
    ("ours", "oracle"), [(spearman, stats.spearmanr), (pearson, stats.pearsonr)]
)
def test_correlations_equal_scipy_on_the_masked_slots(rankings, ours, oracle):
    a, b, mask = rankings
    expected = [oracle(a[i, mask[i]].numpy(), b[i, mask[i]].numpy())[0] for i in range(len(a))]
    np.testing.assert_allclose(ours(a, b, mask).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_average_ranks_equal_scipy(rankings):
    a, _, _ = rankings
    np.testing.assert_array_equal(average_ranks(a).numpy(), stats.rankdata(a.numpy(), axis=1))


@pytest.mark.parametrize("measure", [spearman, pearson])
def test_undefined_correlations_are_nan(measure):
    # The mean of three 0.1 is not 0.1 in float64: a constant row is not centred to zero.
    a = torch.tensor(
        [[1.0, 2.0, 3.0], [0.1, 0.1, 0.1], [1.0, 2.0, 3.0], [1.0, torch.nan, 3.0]],
        dtype=torch.float64,
    )
    b = torch.tensor([[2.0, 4.0, 7.0], [1.0, 2.0, 3.0], [5.0, 6.0, 7.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    assert measure(a, b, mask).isnan().tolist() == [False, True, True, True]


def test_what_lies_outside_the_mask_does_not_matter(rankings):
    a, b, mask = rankings
    noisy = torch.where(mask, a, 1e6)
    for measure in (spearman, pearson):
        torch.testing.assert_close(measure(noisy, b, mask), measure(a, b, mask))
    torch.testing.assert_close(
        top_overlap(noisy, b, mask, 3), top_overlap(a, b, mask, 3), equal_nan=True
    )


def test_top_overlap_by_hand():
    a = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    b = torch.tensor([[1.0, 4.0, 2.0, 2.0], [9.0, 9.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    overlap = top_overlap(a, b, mask, 2)
    assert overlap[:2].tolist() == [0.5, 1.0]
    assert overlap[2].isnan()


@pytest.mark.parametrize("chunk_columns", [1, 4, 256])
def test_auroc_equals_sklearn_with_ties(chunk_columns: int):
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(200, generator=generator) < 0.3
    scores = torch.relu(torch.randn(200, 9, generator=generator) + labels[:, None].float() - 0.5)
    expected = [roc_auc_score(labels.numpy(), column.numpy()) for column in scores.T]
    actual = auroc(scores, labels, chunk_columns=chunk_columns)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)
    assert max(expected) > 0.6
    assert (scores == 0).any()


def test_auroc_of_a_nan_column_is_nan_and_one_class_is_refused():
    scores = torch.tensor([[0.1, torch.nan], [0.9, 0.2], [0.3, 0.1]])
    area = auroc(scores, torch.tensor([False, True, False]))
    assert area[0] == 1
    assert area[1].isnan()
    with pytest.raises(DataError, match="3 positive and 0 negative"):
        auroc(scores, torch.tensor([True, True, True]))

"""What a choice among fits is made by: standard errors and log losses."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss as sklearn_log_loss

from clipattr.probes.selection import best_within_error, log_loss, score, standard_error

N = 400
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, 3, (N,), generator=GENERATOR)
GROUPS = 2 * LABELS + (torch.rand(N, generator=GENERATOR) < 0.2)
IS_RIGHT = torch.rand(N, generator=GENERATOR) < 0.6 + 0.05 * GROUPS
PREDICTED = torch.where(IS_RIGHT, LABELS, (LABELS + 1) % 3)


@pytest.mark.parametrize("criterion", ["accuracy", "balanced_accuracy"])
def test_an_error_is_the_spread_of_the_score_over_draws(criterion: str):
    """Rows of each class are drawn again and again with the rates that were seen."""
    sets = LABELS if criterion == "balanced_accuracy" else torch.zeros_like(LABELS)
    rates = [IS_RIGHT[sets == one].double().mean() for one in sets.unique()]
    draw = torch.Generator().manual_seed(1)
    scores = []
    for _ in range(3000):
        right = torch.rand(N, generator=draw) < torch.stack(rates)[sets]
        predicted = torch.where(right, LABELS, (LABELS + 1) % 3)
        scores.append(score(predicted, LABELS, criterion))
    found = standard_error(PREDICTED, LABELS, criterion)
    assert found == pytest.approx(np.std(scores), rel=0.05)


def test_the_error_of_a_worst_group_is_that_of_its_own_rows():
    rates = [float(IS_RIGHT[group == GROUPS].double().mean()) for group in range(6)]
    rate = min(rates)
    n = int((rates.index(rate) == GROUPS).sum())
    found = standard_error(PREDICTED, LABELS, "worst_group", GROUPS)
    smoothed = (rate * n + 1) / (n + 2)
    assert found == pytest.approx(math.sqrt(smoothed * (1 - smoothed) / n))
    # Ten rows, all of them right: still not sure.
    few = torch.zeros(10, dtype=torch.int64)
    assert standard_error(few, few) == pytest.approx(math.sqrt(11 / 12 * 1 / 12 / 10))


def test_log_loss_is_that_of_scikit_learn():
    logits = torch.randn(N, 3, generator=torch.Generator().manual_seed(2))
    probabilities = logits.double().softmax(dim=1).numpy()
    plain = sklearn_log_loss(LABELS.numpy(), probabilities, labels=[0, 1, 2])
    assert log_loss(logits, LABELS) == pytest.approx(plain)
    weights = 1 / torch.bincount(GROUPS).double()[GROUPS]
    by_group = sklearn_log_loss(
        LABELS.numpy(), probabilities, labels=[0, 1, 2], sample_weight=weights.numpy()
    )
    assert log_loss(logits, LABELS, GROUPS) == pytest.approx(by_group)
    assert by_group != pytest.approx(plain, rel=1e-3)


def test_the_smallest_loss_within_the_error_of_the_best():
    scores, losses = [0.80, 0.90, 0.85, 0.70], [0.1, 0.5, 0.4, 0.0]
    assert best_within_error(scores, [0.0, 0.06, 0.0, 0.0], losses) == 2
    assert best_within_error(scores, [0.0, 0.04, 0.0, 0.0], losses) == 1
    assert best_within_error(scores, [0.0, 0.10, 0.0, 0.0], losses) == 0
    # A member of which less is known is as good for all that is known.
    assert best_within_error(scores, [0.0, 0.04, 0.06, 0.0], losses) == 2

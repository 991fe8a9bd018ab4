"""Suppression and erasure of a cue against plain loops, numpy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.errors import DataError
from clipattr.shortcuts.amplification import remove_latents
from clipattr.shortcuts.repair import (
    Erasure,
    Suppression,
    direction_erasure,
    find_erasure,
    fold_erasure,
    measure_excess,
    restored_share,
    shrink_covariance,
)

N_LATENTS, D_MODEL = 6, 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def erase(rows: Tensor, erasure: Erasure, strength: float = 1.0) -> Tensor:
    """The edit of one row after the other; at part of the strength, of part of it."""
    read, remove, mean = erasure
    return torch.stack([e - strength * remove * read.dot(e - mean) for e in rows.double()])


def token_codes() -> SparseCodes:
    """Of 4 images with 5 tokens; the last slot of each is padding that names latent 2."""
    indices = torch.rand(4, 5, N_LATENTS, generator=seeded()).topk(3, dim=-1).indices
    values = normal(4, 5, 3, seed=1).abs()
    indices[..., 2], values[..., 2] = 2, 0.0
    return SparseCodes(indices, values, N_LATENTS)


def test_excess_equals_plain_loop():
    codes, directions = token_codes(), normal(N_LATENTS, D_MODEL, seed=2)
    suppression = Suppression(torch.tensor([4, 2]), torch.tensor([0.3, -0.7], dtype=torch.float64))
    found = measure_excess(codes, directions, suppression)
    for image in range(4):
        for token in range(5):
            expected = torch.zeros(D_MODEL, dtype=torch.float64)
            for latent, mean in ((4, 0.3), (2, -0.7)):
                activation = 0.0
                for slot in range(2):  # the third is padding
                    if int(codes.indices[image, token, slot]) == latent:
                        activation = float(codes.values[image, token, slot])
                expected += (activation - mean) * directions[latent]
            torch.testing.assert_close(found[image, token], expected, rtol=1e-12, atol=1e-12)


def test_zero_means_remove_the_latents():
    codes, directions = token_codes(), normal(N_LATENTS, D_MODEL, seed=2)
    x, latents = normal(4, 5, D_MODEL, seed=3), torch.tensor([0, 5])
    excess = measure_excess(codes, directions, Suppression(latents, torch.zeros(2)))
    torch.testing.assert_close(x - excess, remove_latents(x, codes, directions, latents))


N_FEATURES = 8
CORE, CUE = 0, 1


def confounded(n: int = 400, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated features of which one is the label's and one the cue's; they agree in 90 %."""
    labels = torch.arange(n) % 2
    agrees = torch.rand(n, generator=seeded(seed)) < 0.9
    has_cue = labels.bool() == agrees
    rows = normal(n, N_FEATURES, seed=seed + 1)
    rows[:, CORE] += 2.0 * labels
    rows[:, CUE] += 3.0 * has_cue
    # Mixed, with spreads that differ by a factor of ten: where the two kinds of projection differ.
    mixing = normal(N_FEATURES, N_FEATURES, seed=9) * torch.linspace(0.3, 3, N_FEATURES)
    return 5 + rows @ mixing, labels, has_cue


def group_means(rows: Tensor, labels: Tensor, has_cue: Tensor) -> dict[tuple[int, bool], Tensor]:
    return {
        (label, cue): rows[(labels == label) & (has_cue == cue)].mean(dim=0)
        for label in (0, 1)
        for cue in (False, True)
    }


def test_erased_rows_say_nothing_about_the_cue():
    rows, labels, has_cue = confounded()
    erased = erase(rows, find_erasure(rows, labels, has_cue))
    means = group_means(erased, labels, has_cue)
    with_cue, without = (sum(means[label, side] for label in (0, 1)) for side in (True, False))
    torch.testing.assert_close(with_cue, without, rtol=0, atol=1e-9)
    # No linear classifier beats chance, groups counting alike: the best one has no weights.
    _, group, counts = (2 * labels + has_cue).unique(return_inverse=True, return_counts=True)
    weights = (len(labels) / 4 / counts[group]).numpy()
    model = LogisticRegression(C=1e6, tol=1e-10, max_iter=10_000)
    fits = [
        np.abs(model.fit(each.numpy(), has_cue.numpy(), weights).coef_).max()
        for each in (erased, rows)
    ]
    assert fits[0] < 1e-4 < 0.1 < fits[1]


def test_erasure_equals_leace_on_rows_repeated_until_groups_are_equal():
    """The formula of the paper, without weights, on a set in which every group is as large.

    Its covariance is shrunk: by what the rows allow, of which the repeated ones are more.
    """
    rows, labels, has_cue = confounded(200)
    groups = 2 * labels + has_cue
    counts = torch.bincount(groups)
    common = math.lcm(*counts.tolist())
    repeated = rows.repeat_interleave(common // counts[groups], dim=0).numpy()
    flags = has_cue.repeat_interleave(common // counts[groups]).double().numpy()
    centred = repeated - repeated.mean(axis=0)
    weights = (1 / counts[groups].double()) / 4
    centred_once = rows - weights @ rows
    sigma_xx = centred.T @ centred / len(centred)
    shrunk = shrink_covariance(centred_once, weights).numpy()
    assert 0 < np.abs(shrunk - sigma_xx).max() < 0.2 * np.abs(sigma_xx).max()
    sigma_xz = centred.T @ (flags - flags.mean())[:, None] / len(centred)
    values, vectors = np.linalg.eigh(shrunk)
    whiten, colour = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
    subspace, _ = np.linalg.qr(whiten @ sigma_xz)
    projection = colour @ subspace @ subspace.T @ whiten
    expected = rows.numpy() - (rows.numpy() - repeated.mean(axis=0)) @ projection.T
    found = erase(rows, find_erasure(rows, labels, has_cue))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [5, 400])
@pytest.mark.parametrize("is_sphere", [False, True])
def test_covariance_is_shrunk_as_scikit_learn_does_it(n: int, is_sphere: bool):
    rows = normal(n, N_FEATURES, seed=n) if is_sphere else confounded(n)[0]
    centred = rows - rows.mean(dim=0)
    expected, shrinkage = ledoit_wolf(centred.numpy(), assume_centered=True)
    found = shrink_covariance(centred, torch.full((n,), 1 / n, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert (shrinkage == 1) == (is_sphere and n == 400)


def test_weighted_covariance_equals_a_plain_loop():
    rows, labels, _ = confounded(50)
    weights = torch.rand(50, generator=seeded(3), dtype=torch.float64)
    weights /= weights.sum()
    centred = rows - weights @ rows
    plain = sum(w * torch.outer(e, e) for w, e in zip(weights, centred, strict=True))
    mu = plain.trace() / N_FEATURES
    sphere = mu * torch.eye(N_FEATURES, dtype=torch.float64)
    error = sum(
        w**2 * (torch.outer(e, e) - plain).square().sum()
        for w, e in zip(weights, centred, strict=True)
    )
    share = float(error / (plain - sphere).square().sum())
    assert 0.01 < share < 0.9
    expected = (1 - share) * plain + share * sphere
    torch.testing.assert_close(shrink_covariance(centred, weights), expected)


def test_hardly_more_rows_than_dimensions_do_not_spoil_other_images():
    """What the images learned from do by chance must not be read as the cue."""
    n_dims = 256

    def draw(n: int, agreement: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.arange(n) % 2
        has_cue = labels.bool() == (torch.rand(n, generator=seeded(seed)) < agreement)
        rows = 0.5 * normal(n, n_dims, seed=seed + 1)
        rows[:, CORE] += 2.4 * labels
        rows[:, CUE] += 1.5 * has_cue
        return rows, labels, has_cue

    train, labels, _ = draw(4000, 0.95, 10)
    fit = LogisticRegression(C=100, max_iter=2000).fit(train.numpy(), labels.numpy())
    weights = torch.from_numpy(np.concatenate([-fit.coef_, fit.coef_]) / 2)
    bias = torch.from_numpy(np.concatenate([-fit.intercept_, fit.intercept_]) / 2)
    others, wanted, _ = draw(2000, 0.5, 30)

    def accuracy(weights: Tensor, bias: Tensor) -> float:
        return float(((others @ weights.T + bias).argmax(dim=1) == wanted).double().mean())

    rows, labels, has_cue = draw(270, 0.95, 50)
    erasure = find_erasure(rows, labels, has_cue)
    folded = fold_erasure(weights, bias, erasure)
    assert accuracy(*folded) > accuracy(weights, bias)
    # The unshrunk one moves the embeddings several times as far.
    assert float(erasure.read.norm() * erasure.remove.norm()) < 1.5


def test_label_stays_in_every_group():
    """Why groups count alike: without it the label would be erased with the cue."""
    rows, labels, has_cue = confounded(2000)
    erased = erase(rows, find_erasure(rows, labels, has_cue)).numpy()
    fit = LogisticRegression(C=1e3, max_iter=10_000).fit(erased, labels.numpy())
    right = torch.from_numpy(fit.predict(erased)) == labels
    rates = [right[(labels == y) & (has_cue == cue)].double().mean() for y, cue in np.ndindex(2, 2)]
    # A core that is two standard deviations apart allows 84 %.
    assert min(rates) > 0.75


def test_label_on_one_side_alone_is_left_out():
    rows, labels, has_cue = confounded()
    third = torch.full((50,), 7)
    found = find_erasure(
        torch.cat([rows, normal(50, N_FEATURES, seed=4) + 100]),
        torch.cat([labels, third]),
        torch.cat([has_cue, torch.ones(50, dtype=torch.bool)]),
    )
    for one, other in zip(found, find_erasure(rows, labels, has_cue), strict=True):
        torch.testing.assert_close(one, other)


def test_fewer_rows_than_features():
    rows, labels, has_cue = confounded(40)
    wide = torch.cat([rows, normal(40, 60, seed=5)], dim=1)
    erased = erase(wide, find_erasure(wide, labels, has_cue))
    means = group_means(erased, labels, has_cue)
    difference = sum(means[label, True] - means[label, False] for label in (0, 1))
    assert float(difference.abs().max()) < 1e-9


def test_nothing_to_erase():
    rows, labels, _ = confounded()
    with pytest.raises(DataError, match="no label of the 400 images occurs with and without"):
        find_erasure(rows, labels, labels == 1)
    same = torch.ones(4, 3)
    with pytest.raises(DataError, match="no direction to erase"):
        find_erasure(same, torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, False]))
    for length in (0.0, math.nan):
        with pytest.raises(DataError, match="nothing to erase"):
            direction_erasure(torch.full((8,), length), rows)


def test_direction_is_brought_to_its_mean():
    rows, direction = confounded()[0], 7 * normal(N_FEATURES, seed=6)
    erased = erase(rows, direction_erasure(direction, rows))
    along = erased @ direction
    torch.testing.assert_close(along, (rows @ direction).mean().expand(len(rows)))
    # Orthogonal: what was taken lies along the direction.
    taken = rows - erased
    amounts = taken @ direction
    torch.testing.assert_close(amounts.abs(), taken.norm(dim=1) * direction.norm())


def test_folding_equals_editing_the_embedding():
    rows, labels, has_cue = confounded()
    weights, bias = normal(3, N_FEATURES, seed=7), normal(3, seed=8)
    erasure = find_erasure(rows, labels, has_cue)
    folded = fold_erasure(weights, bias, erasure)
    expected = erase(rows, erasure) @ weights.T + bias
    torch.testing.assert_close(rows @ folded.weights.T + folded.bias, expected)
    assert (folded.weights - weights).abs().max() > 0.01


def test_restored_share():
    assert restored_share(0.59, 0.885, 0.905) == pytest.approx(0.295 / 0.315)
    assert restored_share(0.5, 0.5, 0.9) == 0
    assert restored_share(0.5, 0.4, 0.9) == pytest.approx(-0.25)
    assert math.isnan(restored_share(0.9, 0.95, 0.9))
    # Less than one point was lost: 50 times as much came back, of nothing.
    assert math.isnan(restored_share(0.80, 0.85, 0.801))
    assert restored_share(0.80, 0.81, 0.82) == pytest.approx(0.5)

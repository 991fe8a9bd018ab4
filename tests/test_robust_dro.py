"""GroupDRO against scipy's constrained solvers, closed cases, and its own certificate."""

import logging

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipattr.probes import group_dro
from clipattr.probes.group_dro import fit_group_dro
from clipattr.probes.group_rows import Candidate, GroupRows, choose
from clipattr.probes.logistic import solve_path


def make_rows(n_classes: int, seed: int = 0, n: int = 240) -> tuple[GroupRows, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=draw)
    cue = torch.where(torch.rand(n, generator=draw) < 0.85, labels % 2, 1 - labels % 2)
    x = torch.randn(n, 3, generator=draw)
    x[torch.arange(n), labels] += 1.0
    x[:, 0] += 1.5 * (2 * cue - 1)
    groups = labels * 2 + cue
    return GroupRows(x * torch.tensor([1.0, 3.0, 0.5]) + 2, labels, groups), groups


def columns_to_logits(z: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(z), z], dim=1) if z.shape[1] == 1 else z


def group_losses(rows: GroupRows, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain, in float64."""
    logits = columns_to_logits(rows.features.double() @ weight.T + bias)
    losses = cross_entropy(logits, rows.labels, reduction="none")
    assert rows.groups is not None
    return torch.stack([losses[rows.groups == g].mean() for g in rows.groups.unique()])


def objective(rows: GroupRows, one: Candidate) -> float:
    _, weight, bias, *_ = one.solution
    worst = group_losses(rows, weight, bias).max()
    return float(one.solution.C * len(rows.labels) * worst + weight.square().sum() / 2)


def solve_by_scipy(rows: GroupRows, n_classes: int, C: float, start: np.ndarray) -> float:
    """Minimise t + |W|^2 / (2 C n) with t at least the loss of each group."""
    columns, width = 1 if n_classes == 2 else n_classes, rows.features.shape[1]

    def unpack(v: Tensor) -> tuple[Tensor, Tensor]:
        return v[: columns * width].view(columns, width), v[columns * width : -1]

    def value(v: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(v, requires_grad=True)
        result = at[-1] + unpack(at)[0].square().sum() / (2 * C * len(rows.labels))
        return result.item(), torch.autograd.grad(result, at)[0].numpy()

    def slack(v: np.ndarray) -> np.ndarray:
        at = torch.as_tensor(v)
        return (at[-1] - group_losses(rows, *unpack(at))).numpy()

    def slopes(v: np.ndarray) -> np.ndarray:
        at = torch.as_tensor(v)
        return torch.autograd.functional.jacobian(
            lambda p: p[-1] - group_losses(rows, *unpack(p)), at
        ).numpy()

    found = minimize(
        value,
        start,
        jac=True,
        method="SLSQP",
        constraints={"type": "ineq", "fun": slack, "jac": slopes},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success, found.message
    return found.fun * C * len(rows.labels)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("C", [1e-3, 0.05, 10.0])
def test_is_the_solution_of_the_constrained_problem(n_classes: int, C: float):
    rows, groups = make_rows(n_classes)
    (one,) = fit_group_dro(rows, groups, n_classes, [C])
    columns = 1 if n_classes == 2 else n_classes
    expected = solve_by_scipy(rows, n_classes, C, np.append(np.zeros(columns * 4), 2.0))
    found = objective(rows, one)
    assert one.solution.converged
    assert one.solution.objective == pytest.approx(found, rel=1e-5)
    assert -1e-6 < found / expected - 1 < 2e-4
    # What it says of itself bounds what it is off by.
    assert found / expected - 1 < one.solution.gap + 1e-5


@pytest.mark.parametrize("n_classes", [2, 3])
def test_groups_that_count_have_the_largest_loss(n_classes: int):
    rows, groups = make_rows(n_classes)
    (one,) = fit_group_dro(rows, groups, n_classes, [0.1])
    losses = group_losses(rows, one.solution.weight, one.solution.bias)
    q = torch.tensor(list(one.details.values()))
    assert list(one.details) == [f"weight of group {g}" for g in range(2 * n_classes)]
    assert float(q.sum()) == pytest.approx(1)
    counts = q > 0.02
    assert 2 <= int(counts.sum()) < len(q)
    torch.testing.assert_close(
        losses[counts], losses.max().expand(int(counts.sum())), atol=0, rtol=2e-3
    )
    assert bool((losses <= losses.max()).all())
    assert float(losses[~counts].min()) < float(losses.max()) * 0.98
    # The probe is the best answer to those weights: logistic regression with them on the rows.
    sizes = torch.bincount(groups)
    targets = rows.labels[:, None].float() if n_classes == 2 else rows.labels
    ((plain,),) = solve_path(
        rows.features,
        targets,
        [0.1],
        n_classes=None if n_classes == 2 else n_classes,
        weights=(len(groups) * q / sizes)[groups].float(),
        tol=1e-9,
    )
    torch.testing.assert_close(one.solution.weight, plain.weight, atol=5e-3, rtol=2e-2)


def test_a_path_ends_where_each_penalty_does_alone():
    """Groups that count for nothing under a strong penalty must come back under a weak one."""
    rows, _ = make_rows(3, seed=5)
    groups = torch.randint(6, (240,), generator=torch.Generator().manual_seed(1))
    rows = rows._replace(groups=groups)
    Cs = [10.0, 1e-4, 0.01, 1.0]
    path = fit_group_dro(rows, groups, 3, Cs)
    assert [one.solution.C for one in path] == sorted(Cs)
    for one in path:
        (alone,) = fit_group_dro(rows, groups, 3, [one.solution.C])
        assert one.solution.converged
        assert alone.solution.converged
        assert objective(rows, one) == pytest.approx(objective(rows, alone), rel=2e-4)


def test_a_group_without_weight_comes_back(monkeypatch: pytest.MonkeyPatch):
    rows, groups = make_rows(2)
    (plain,) = fit_group_dro(rows, groups, 2, [0.1])
    needed = max(range(4), key=lambda g: plain.details[f"weight of group {g}"])
    solve = group_dro._solve

    def solve_without(game, at, *options):
        at.log_q[needed] = -1e4
        return solve(game, at, *options)

    monkeypatch.setattr(group_dro, "_solve", solve_without)
    (one,) = fit_group_dro(rows, groups, 2, [0.1])
    assert one.solution.converged
    assert objective(rows, one) == pytest.approx(objective(rows, plain), rel=2e-4)


@pytest.mark.parametrize("standardise", [False, True])
def test_one_group_is_plain_logistic_regression(standardise: bool):
    rows, _ = make_rows(3)
    (one,) = fit_group_dro(rows, torch.zeros(240).long(), 3, [0.3], standardise=standardise)
    ((plain,),) = solve_path(
        rows.features, rows.labels, [0.3], n_classes=3, standardise=standardise
    )
    assert one.solution.objective == pytest.approx(plain.objective, rel=1e-4)
    torch.testing.assert_close(one.solution.weight, plain.weight, atol=5e-3, rtol=2e-2)
    torch.testing.assert_close(one.solution.bias, plain.bias, atol=2e-2, rtol=2e-2)


def test_equal_groups_have_equal_weights():
    rows, _ = make_rows(2)
    twice = GroupRows(rows.features.repeat(2, 1), rows.labels.repeat(2))
    (one,) = fit_group_dro(twice, torch.arange(480) // 240, 2, [0.3])
    assert one.solution.converged
    assert list(one.details.values()) == pytest.approx([0.5, 0.5], abs=1e-3)


def test_says_that_it_is_not_the_solution(caplog: pytest.LogCaptureFixture):
    rows, groups = make_rows(2)
    (early,) = fit_group_dro(rows, groups, 2, [1.0], max_rounds=1)
    (end,) = fit_group_dro(rows, groups, 2, [1.0])
    off = objective(rows, early) / objective(rows, end) - 1
    assert not early.solution.converged
    assert 1e-3 < off < early.solution.gap
    with caplog.at_level(logging.WARNING):
        found = choose([early], None, criterion="accuracy", n_classes=2)
    assert "C=1: stopped" in caplog.text
    assert not found.trials[0].converged

"""Logistic regression against scikit-learn, closed forms and autograd."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize, rosen, rosen_der
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from clipattr.errors import ConfigError, DataError
from clipattr.probes.lbfgs import Evaluation, search, solve
from clipattr.probes.logistic import Solution, solve_path
from clipattr.probes.objective import (
    Problem,
    Rows,
    Spectrum,
    evaluate,
    kronecker,
    mean_curvature,
    measure_moments,
)

CS = [10.0, 0.03, 1.0]


def make_rows(n_classes: int, n_rows: int = 700, width: int = 6) -> tuple[Tensor, Tensor]:
    """Overlapping classes, features of different sizes around a mean that is not zero."""
    draw = torch.Generator().manual_seed(n_classes)
    labels = torch.randint(n_classes, (n_rows,), generator=draw)
    centres = torch.randn(n_classes, width, generator=draw)
    sizes = torch.logspace(-1, 0.5, width)
    rows = (centres[labels] + 1.5 * torch.randn(n_rows, width, generator=draw)) * sizes
    return rows + torch.randn(width, generator=draw), labels


def objective(x: Tensor, y: Tensor, s: Tensor, one: Solution) -> float:
    """C sum s loss + |W|^2 / 2 in float64."""
    logits = x.double() @ one.weight.T + one.bias
    if len(one.weight) == 1:
        losses = binary_cross_entropy_with_logits(logits[:, 0], y.double(), reduction="none")
    else:
        losses = cross_entropy(logits, y, reduction="none")
    return float(one.C * (s.double() * losses).sum() + one.weight.square().sum() / 2)


def solve_labels(x: Tensor, y: Tensor, Cs: list[float], **options: object) -> list[Solution]:
    n_classes = int(y.max()) + 1
    if n_classes == 2:
        paths = solve_path(x, y[:, None].float(), Cs, **options)  # pyright: ignore
    else:
        paths = solve_path(x, y, Cs, n_classes=n_classes, **options)  # pyright: ignore
    return [one for (one,) in paths]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_agrees_with_sklearn(n_classes: int, together: bool, is_weighted: bool):
    x, y = make_rows(n_classes)
    s = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) if is_weighted else None
    solutions = solve_labels(x, y, CS, weights=s, together=together, tol=1e-9)
    counts = torch.ones(len(x)) if s is None else s
    for C, one in zip(CS, solutions, strict=True):
        reference = LogisticRegression(C=C, tol=1e-9, max_iter=10_000)
        reference.fit(x.double().numpy(), y.numpy(), counts.double().numpy())
        torch.testing.assert_close(
            one.weight, torch.as_tensor(reference.coef_), atol=2e-3, rtol=2e-3
        )
        theirs = torch.as_tensor(reference.coef_), torch.as_tensor(reference.intercept_)
        expected = objective(x, y, counts, one._replace(weight=theirs[0], bias=theirs[1]))
        found = objective(x, y, counts, one)
        assert (one.C, one.converged) == (C, True)
        assert abs(found / expected - 1) < 1e-6
        assert one.objective == pytest.approx(found, rel=1e-6)


def test_default_tolerance_is_within_a_tenth_of_a_point():
    x, y = make_rows(8, n_rows=12_000, width=24)
    fresh, truth = x[2000:], y[2000:]
    Cs = [1e-4, 1e-2, 1.0, 100.0]
    for C, one in zip(Cs, solve_labels(x[:2000], y[:2000], Cs), strict=True):
        reference = LogisticRegression(C=C, tol=1e-8, max_iter=10_000)
        reference.fit(x[:2000].double().numpy(), y[:2000].numpy())
        weight, bias = torch.as_tensor(reference.coef_), torch.as_tensor(reference.intercept_)
        s = torch.ones(2000)
        expected = objective(x[:2000], y[:2000], s, one._replace(weight=weight, bias=bias))
        assert 0 <= objective(x[:2000], y[:2000], s, one) / expected - 1 + 1e-9 < 1e-3
        found = (fresh.double() @ one.weight.T + one.bias).argmax(1) == truth
        theirs = (fresh.double() @ weight.T + bias).argmax(1) == truth
        assert abs(int(found.sum()) - int(theirs.sum())) <= 10  # of 10,000


def test_standardised_is_the_pipeline_in_raw_units():
    x, y = make_rows(3)
    x[:, 2] = 4.0  # never varies
    (one,) = solve_labels(x, y, [0.5], standardise=True, tol=1e-9)
    scaler = StandardScaler().fit(x.double().numpy())
    reference = LogisticRegression(C=0.5, tol=1e-9, max_iter=10_000)
    reference.fit(scaler.transform(x.double().numpy()), y.numpy())
    expected = reference.decision_function(scaler.transform(x.double().numpy()))
    found = x.double() @ one.weight.T + one.bias
    torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("C", [0.1, 3.0, 1000.0])
def test_two_points_have_a_closed_form(C: float):
    # At x = +-a with labels 1, 0: w = 2 C a sigmoid(-w a), b = 0.
    a = 0.7
    w = brentq(lambda w: w - 2 * C * a / (1 + math.exp(w * a)), 0, 500)
    (one,) = solve_labels(torch.tensor([[a], [-a]]), torch.tensor([1, 0]), [C], tol=1e-12)
    assert float(one.weight) == pytest.approx(w, rel=1e-4)
    assert float(one.bias) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_tasks_are_solved_as_if_alone(together: bool):
    x, y = make_rows(5)
    targets = torch.nn.functional.one_hot(y, 5).float()
    Cs = [0.1, 0.2, 1.0, 30.0]
    path = solve_path(x, targets, Cs, tol=1e-7, together=together)
    for column in range(5):
        alone = solve_path(x, targets[:, [column]], Cs, tol=1e-7, together=together)
        for both, (one,) in zip(path, alone, strict=True):
            torch.testing.assert_close(both[column].weight, one.weight, atol=1e-3, rtol=1e-3)
            # The same start: nothing of another task.
            assert both[column].n_iterations == one.n_iterations


def test_a_path_is_followed():
    # Apart, so that weights grow with C for ever: starts on the line through the last two.
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(5, (400,), generator=draw)
    x = 4 * torch.randn(5, 8, generator=draw)[y] + torch.randn(400, 8, generator=draw)
    path = solve_labels(x, y, [float(C) for C in np.logspace(-1, 5, 13)], together=False)
    assert all(one.converged for one in path)
    # 36; from the last solution itself 145, from zero 550.
    assert sum(one.n_iterations for one in path[2:]) < 80


def test_a_large_mean_costs_no_digits():
    x, y = make_rows(3)
    moved = (x * 64).round() / 64 + 4096.0  # exact in float32
    (near,) = solve_labels((x * 64).round() / 64, y, [1.0], tol=1e-9)
    (far,) = solve_labels(moved, y, [1.0], tol=1e-9)
    torch.testing.assert_close(near.weight, far.weight, atol=1e-3, rtol=1e-3)


def test_separable_rows_end_at_the_minimum():
    x, y = torch.cat([torch.randn(50, 3) + 9, torch.randn(50, 3) - 9]), torch.arange(100) // 50
    Cs = [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]
    for one in solve_labels(x, y, Cs, together=False):
        reference = minimize(
            lambda v, C=one.C: objective(
                x,
                y,
                torch.ones(100),
                one._replace(weight=torch.as_tensor(v[None, :3]), bias=torch.as_tensor(v[3:]), C=C),  # noqa: B023
            ),
            np.append(one.weight.numpy(), one.bias.numpy()),
            method="Nelder-Mead",
        )
        assert one.converged
        assert one.objective == pytest.approx(reference.fun, rel=1e-4)


def test_says_that_it_did_not_converge():
    x, y = make_rows(5)
    (one,) = solve_labels(x, y, [100.0], max_iter=1)
    (end,) = solve_labels(x, y, [100.0])
    assert not one.converged
    assert one.n_iterations == 1
    # An estimate: of the right size.
    assert 0.3 < one.gap * one.objective / (one.objective - end.objective) < 3


@pytest.mark.parametrize("is_binary", [False, True])
def test_gradient_and_curvature_are_those_of_autograd(is_binary: bool):
    x, y = make_rows(3, n_rows=5000, width=4)  # more than one block
    s, draw = torch.rand(len(x)), torch.Generator().manual_seed(2)
    targets = torch.nn.functional.one_hot(y, 3).float() if is_binary else y
    columns = 1 if is_binary else 3
    rows = Rows(x, targets, s, torch.full((4,), 0.5), torch.full((4,), 2.0), columns)
    problems = {4: Problem(0.1, 2), 7: Problem(0.3, 1)}
    points = {i: torch.randn(columns, 5, generator=draw, dtype=torch.float64) for i in problems}
    found = evaluate(rows, problems, points)
    curvatures = mean_curvature(rows, points)
    u = ((x - 0.5) * 2).double()
    for i, point in points.items():
        point.requires_grad_()
        logits = u @ point[:, :-1].T + point[:, -1]
        if is_binary:
            wanted = targets[:, problems[i].target].double()
            losses = binary_cross_entropy_with_logits(logits[:, 0], wanted, reduction="none")
            p = logits.sigmoid()
        else:
            losses = cross_entropy(logits, y, reduction="none")
            p = logits.softmax(1)
        mean = (losses * s).sum() / s.double().sum()
        expected = mean + problems[i].ridge / 2 * point[:, :-1].square().sum()
        (gradient,) = torch.autograd.grad(expected, point)
        assert found[i].value == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(found[i].gradient, gradient, atol=1e-6, rtol=1e-5)
        each = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected = (each * s[:, None, None]).sum(0) / s.double().sum()
        torch.testing.assert_close(curvatures[i], expected, atol=1e-6, rtol=1e-5)


def test_moments_are_those_of_numpy():
    x, _ = make_rows(3, n_rows=9000)
    s = torch.rand(len(x))
    mean, covariance = measure_moments(x, s)
    exact = s.double().numpy()
    expected = np.cov(x.double().numpy(), rowvar=False, aweights=exact, ddof=0)
    np.testing.assert_allclose(mean, np.average(x.double(), axis=0, weights=exact), rtol=1e-5)
    np.testing.assert_allclose(covariance, expected, rtol=1e-4, atol=1e-6)


def test_preconditioner_inverts_the_product():
    draw = torch.Generator().manual_seed(0)
    root, features = (torch.randn(n, 20, generator=draw, dtype=torch.float64) for n in (3, 5))
    curvature, covariance = root @ root.T, features @ features.T
    centre = torch.eye(3, dtype=torch.float64) - 1 / 3
    curvature = centre @ curvature @ centre
    spectrum = Spectrum(*torch.linalg.eigh(covariance))
    gradient = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    found = kronecker(curvature, spectrum, 0.2)(gradient)
    of_weight = torch.kron(curvature, covariance) + 0.2 * torch.eye(15, dtype=torch.float64)
    expected = torch.linalg.solve(of_weight, gradient[:, :-1].flatten()).view(3, 5)
    torch.testing.assert_close(found[:, :-1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, -1], torch.linalg.pinv(curvature) @ gradient[:, -1])


def test_search_finds_the_valley_of_rosenbrock():
    def evaluate_all(points):
        return {
            i: Evaluation(1 + rosen(p.numpy()), torch.as_tensor(rosen_der(p.numpy())))
            for i, p in points.items()
        }

    starts = [torch.tensor(one, dtype=torch.float64) for one in ([-1.2, 1], [0.0, 3], [1.0, 1])]
    searches = [search(one, lambda g: g, tol=1e-12, max_iter=200) for one in starts]
    minima = solve(searches, evaluate_all)
    for one in minima:
        assert one.converged
        torch.testing.assert_close(one.point, torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)
    assert minima[2].n_iterations == 0
    assert all(one.n_iterations < 60 for one in minima)


def test_exact_preconditioner_needs_one_step():
    matrix = torch.diag(torch.tensor([1.0, 50.0, 1e4], dtype=torch.float64))
    one = search(
        torch.ones(3, dtype=torch.float64), lambda g: g / matrix.diagonal(), tol=1e-9, max_iter=9
    )
    (minimum,) = solve(
        [one], lambda at: {0: Evaluation(float(at[0] @ matrix @ at[0] / 2 + 1), matrix @ at[0])}
    )
    assert (minimum.n_iterations, minimum.converged) == (1, True)
    assert minimum.value == pytest.approx(1)


def test_search_ends_where_no_step_is_better():
    # A gradient that points the wrong way: no step meets the conditions.
    one = search(torch.ones(1, dtype=torch.float64), lambda g: g, tol=1e-9, max_iter=9)
    (minimum,) = solve([one], lambda at: {0: Evaluation(float(at[0].square()), -2 * at[0])})
    assert not minimum.converged
    assert float(minimum.point) == 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"Cs": [0.0]}, ConfigError, "greater than 0"),
        ({"Cs": []}, ConfigError, "at least one"),
        ({"n_classes": 2}, ConfigError, "binary task"),
        ({"n_classes": 4}, DataError, "between 0 and 3"),
        ({"targets": torch.full((700, 1), 0.5)}, DataError, "0 or 1"),
        ({"weights": torch.zeros(700)}, DataError, "not all 0"),
        ({"weights": torch.full((700,), -1.0)}, DataError, "none negative"),
        ({"features": torch.full((700, 6), torch.nan)}, DataError, "nan"),
    ],
)
def test_refuses(changes: dict[str, object], kind: type[Exception], message: str):
    x, y = make_rows(5)
    arguments = {"features": x, "targets": y, "Cs": [1.0], "n_classes": 5, **changes}
    with pytest.raises(kind, match=message):
        solve_path(**arguments)  # pyright: ignore

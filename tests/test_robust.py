"""Group methods against plain loops with scikit-learn, and what they do to a shortcut."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from clipattr.errors import ConfigError, DataError
from clipattr.probes.estimator import LogisticProbe
from clipattr.probes.linear import LinearProbe
from clipattr.probes.resampling import draw_balanced, fit_subsets, fit_twice
from clipattr.probes.robust import METHODS, GroupRows, fit_groups

CS = [0.01, 0.1, 1.0]


def make_rows(seed: int, n: int = 500, n_classes: int = 2) -> GroupRows:
    """A weak core feature for each class, a strong cue that goes with the label in 9 of 10 rows."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=draw)
    agrees = torch.rand(n, generator=draw) < 0.9
    cue = torch.where(agrees, labels % 2, 1 - labels % 2)
    x = torch.randn(n, 6, generator=draw)
    x[torch.arange(n), labels] += 1.2
    x[:, 5] += 1.5 * (2 * cue - 1)
    return GroupRows(3 * x + 1, labels, labels * 2 + cue)


def plain_worst(right: np.ndarray, groups: np.ndarray) -> float:
    return min(right[groups == group].mean() for group in set(groups.tolist()))


def sklearn_fit(
    x: np.ndarray, y: np.ndarray, C: float, s: np.ndarray | None = None
) -> LogisticRegression:
    return LogisticRegression(C=C, tol=1e-8, max_iter=9999).fit(x.astype(np.float64), y, s)


def assert_same(probe: LinearProbe, x: torch.Tensor, expected: np.ndarray) -> None:
    with torch.no_grad():
        found = probe(x).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_erm_is_the_logistic_probe(n_classes: int):
    rows = make_rows(0, n_classes=n_classes)
    found = fit_groups("erm", rows, n_classes=n_classes, Cs=[0.3], standardise=True)
    probe = LogisticProbe(0.3, standardise=True).fit(rows.features, rows.labels)
    assert_same(found.probe, rows.features, probe.predict_proba(rows.features))
    assert (found.C, found.score != found.score) == (0.3, True)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_balanced_gives_each_group_the_same_weight(n_classes: int):
    x, y, groups = make_rows(0, n_classes=n_classes)
    found = fit_groups("balanced", GroupRows(x, y, groups), n_classes=n_classes, Cs=[0.05])
    assert groups is not None
    sizes = np.bincount(groups)
    s = len(y) / len(sizes) / sizes[groups]
    reference = sklearn_fit(x.numpy(), y.numpy(), 0.05, s)
    assert_same(found.probe, x, reference.predict_proba(x))


def test_subsets_have_as_many_of_each_group_and_no_row_twice():
    groups = make_rows(0).groups
    assert groups is not None
    draw = torch.Generator().manual_seed(3)
    first, second = (draw_balanced(groups, draw) for _ in range(2))
    assert len(set(first.tolist())) == len(first)
    assert torch.bincount(groups[first]).tolist() == [int(torch.bincount(groups).min())] * 4
    assert first.tolist() != second.tolist()
    # Every row of a large group has its chance.
    seen = torch.cat([draw_balanced(groups, draw) for _ in range(200)])
    assert len(set(seen.tolist())) == len(groups)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_dfr_is_the_mean_of_fits_on_subsets(n_classes: int):
    x, y, groups = make_rows(1, n_classes=n_classes)
    assert groups is not None
    found = fit_groups("dfr", GroupRows(x, y, groups), n_classes=n_classes, Cs=[0.05], seed=4)
    scaler = StandardScaler().fit(x.double().numpy())
    scaled, draw = scaler.transform(x.double().numpy()), torch.Generator().manual_seed(4)
    logits = []
    for _ in range(10):
        place = draw_balanced(groups, draw).numpy()
        one = sklearn_fit(scaled[place], y[place].numpy(), 0.05)
        logits.append(one.decision_function(scaled))
    mean = torch.as_tensor(np.mean(logits, axis=0))
    if n_classes == 2:
        mean = torch.stack([-mean / 2, mean / 2], dim=1)
    assert_same(found.probe, x, mean.softmax(1).numpy())
    other = fit_groups("dfr", GroupRows(x, y, groups), n_classes=n_classes, Cs=[0.05], seed=5)
    assert not torch.equal(found.probe.weight, other.probe.weight)


def test_a_constant_feature_is_no_trouble():
    rows = make_rows(0)
    rows.features[:, 2] = 7.0
    assert rows.groups is not None
    for one in fit_subsets(rows, rows.groups, 2, [0.1]):
        assert bool(one.solution.weight.isfinite().all())


def test_jtt_is_a_plain_loop_chosen_on_the_worst_group():
    (x, y, _), held_out = make_rows(2), make_rows(3)
    raw, labels = x.numpy(), y.numpy()
    assert held_out.groups is not None
    best = -1.0
    for first in CS:
        wrong = sklearn_fit(raw, labels, first).predict(raw) != labels
        for upweight in (3.0, 30.0):
            s = np.where(wrong, upweight, 1.0)
            for C in CS:
                one = sklearn_fit(raw, labels, C, s / s.mean())
                right = one.predict(held_out.features.numpy()) == held_out.labels.numpy()
                best = max(best, plain_worst(right, held_out.groups.numpy()))
    rows = GroupRows(x, y)
    found = fit_groups("jtt", rows, n_classes=2, Cs=CS, validation=held_out, upweights=(3.0, 30.0))
    assert found.score == pytest.approx(best, abs=0.02)
    assert max(one.score for one in found.trials) == found.score
    wrong = sklearn_fit(raw, labels, found.details["C of the first model"]).predict(raw) != labels
    assert found.details["wrong rows of the first model"] == wrong.sum()
    s = np.where(wrong, found.details["upweight"], 1.0)
    reference = sklearn_fit(raw, labels, found.C, s / s.mean())
    assert_same(found.probe, x, reference.predict_proba(x))


def test_jtt_starts_from_a_model_that_is_given():
    rows = make_rows(2)
    start = LinearProbe(6, 2)
    with torch.no_grad():
        start.weight[1, 5] = 1.0
        start.bias[1] = -1.0
    wrong = (rows.features[:, 5] > 1) != (rows.labels == 1)
    (one,) = fit_twice(rows, 2, [0.1], upweights=(8.0,), start=start)
    assert one.details == {"upweight": 8.0, "wrong rows of the first model": float(wrong.sum())}
    s = torch.where(wrong, 8.0, 1.0).double().numpy()
    reference = sklearn_fit(rows.features.numpy(), rows.labels.numpy(), 0.1, s / s.mean())
    found = torch.as_tensor(reference.coef_)
    torch.testing.assert_close(one.solution.weight, found, atol=2e-3, rtol=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_chosen_on_validation_rows_alone_of_equals_the_strongest_penalty(method: str):
    rows, held_out = make_rows(4), make_rows(5)
    Cs = [1.0, 1e-5, 0.01]
    options = {"upweights": (5.0,)} if method == "jtt" else {}
    found = fit_groups(method, rows, n_classes=2, Cs=Cs, validation=held_out, **options)  # pyright: ignore
    assert held_out.groups is not None
    with torch.no_grad():
        right = (found.probe(held_out.features).argmax(1) == held_out.labels).numpy()
    assert found.score == pytest.approx(plain_worst(right, held_out.groups.numpy()))
    assert [one.C for one in found.trials] == sorted(one.C for one in found.trials)
    equal = [one.C for one in found.trials if one.score == found.score]
    assert (found.C, found.score) == (min(equal), max(one.score for one in found.trials))
    turned = held_out._replace(labels=1 - held_out.labels)
    other = fit_groups(method, rows, n_classes=2, Cs=Cs, validation=turned, **options)  # pyright: ignore
    assert other.score == max(one.score for one in other.trials)
    assert [one.score for one in other.trials] != [one.score for one in found.trials]


def make_shortcut(seed: int, n: int, share: float) -> GroupRows:
    """Two features: one that holds for all rows, and a clearer one that holds for `share`."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=draw)
    cue = torch.where(torch.rand(n, generator=draw) < share, y, 1 - y)
    core = (2 * y - 1) + 0.8 * torch.randn(n, generator=draw)
    spurious = (2 * cue - 1) + 0.5 * torch.randn(n, generator=draw)
    return GroupRows(torch.stack([core, spurious], 1), y, 2 * y + cue)


def test_a_shortcut_costs_erm_most_and_group_methods_least():
    fit, held_out = make_shortcut(0, 3000, 0.95), make_shortcut(1, 2000, 0.95)
    fresh = make_shortcut(2, 20_000, 0.5)
    assert fresh.groups is not None
    worst = {}
    for method in METHODS:
        rows = fit._replace(groups=None) if method in ("erm", "jtt") else fit
        found = fit_groups(method, rows, n_classes=2, Cs=[1e-4, 0.01, 1.0], validation=held_out)
        with torch.no_grad():
            right = (found.probe(fresh.features).argmax(1) == fresh.labels).numpy()
        worst[method] = plain_worst(right, fresh.groups.numpy())
    # 0.565, 0.855, 0.888, 0.887, 0.891
    assert worst["erm"] < 0.6
    assert worst["erm"] + 0.2 < worst["jtt"]
    assert worst["jtt"] + 0.02 < min(worst["balanced"], worst["group_dro"], worst["dfr"])


ROWS = make_rows(0)
ONE_OF_3 = torch.where(torch.arange(500) == 0, 3, torch.arange(500) % 2)


@pytest.mark.parametrize(
    ("method", "rows", "options", "kind", "message"),
    [
        ("irm", ROWS, {}, ConfigError, "must be one of erm"),
        ("erm", ROWS, {"Cs": CS}, ConfigError, "3 fits to choose from, and no validation"),
        ("erm", ROWS, {"start": LinearProbe(6, 2)}, ConfigError, "takes no start"),
        ("erm", ROWS, {"n_classes": 1}, ConfigError, "at least 2"),
        ("erm", ROWS._replace(labels=ROWS.labels * 0), {}, DataError, "all rows have the label 0"),
        ("erm", ROWS._replace(labels=ROWS.labels * 2), {}, DataError, "allowed is 0 to 1"),
        ("erm", ROWS._replace(labels=ROWS.labels[:9]), {}, DataError, "500 of features and 9"),
        ("dfr", ROWS._replace(groups=ROWS.labels[:9]), {}, DataError, "500 labels and 9 groups"),
        ("dfr", ROWS._replace(groups=ROWS.labels - 1), {}, DataError, "number -1, below 0"),
        ("balanced", ROWS._replace(groups=None), {}, DataError, "balanced needs the group"),
        ("group_dro", ROWS._replace(groups=ROWS.labels * 2), {}, DataError, "group 1 has 0"),
        ("dfr", ROWS._replace(groups=ONE_OF_3), {}, DataError, "group 2 has 0, group 3 has 1"),
        (
            "balanced",
            ROWS,
            {"validation": ROWS._replace(groups=ONE_OF_3 * 2)},
            DataError,
            "group 6",
        ),
        ("erm", ROWS, {"validation": ROWS._replace(groups=None)}, DataError, "group of each"),
        (
            "erm",
            ROWS,
            {"validation": ROWS._replace(features=ROWS.features[:, :5])},
            DataError,
            "have 6 features, validation rows 5",
        ),
        (
            "jtt",
            GroupRows(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])),
            {},
            DataError,
            "gets all 2 rows right",
        ),
    ],
)
def test_refuses(
    method: str, rows: GroupRows, options: dict[str, object], kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message):
        fit_groups(method, rows, **{"n_classes": 2, "Cs": [0.1], **options})  # pyright: ignore

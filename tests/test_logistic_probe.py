"""LogisticProbe against scikit-learn, and selection against plain loops."""

import logging

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.multiclass import OneVsRestClassifier

from clipattr.errors import ConfigError, DataError
from clipattr.probes.estimator import LogisticProbe, Validation
from clipattr.probes.selection import best, score

NAMES = np.array(["owl", "ant", "bee", "cat"])


def make_rows(n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    numbers = np.minimum(draw.integers(0, n_classes + 2, 900), n_classes - 1)
    centres = np.random.default_rng(99).normal(size=(n_classes, 8))
    rows = centres[numbers] + 1.5 * draw.normal(size=(900, 8))
    return rows.astype(np.float32), NAMES[numbers]


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize(
    "weight", [None, "balanced", {"owl": 1.0, "ant": 2.5, "bee": 1.0, "cat": 3.0}]
)
def test_equals_sklearn(n_classes: int, weight: object):
    x, y = make_rows(n_classes)
    s = np.random.default_rng(5).random(len(x))
    probe = LogisticProbe(0.3, class_weight=weight, tol=1e-9).fit(x, y, s)  # pyright: ignore
    if isinstance(weight, dict):
        weight = {name: weight[name] for name in set(y.tolist())}
    reference = LogisticRegression(C=0.3, class_weight=weight, tol=1e-9, max_iter=9999)
    reference.fit(x.astype(np.float64), y, s)
    assert probe.classes_.tolist() == reference.classes_.tolist()
    close = {"rtol": 2e-3, "atol": 2e-3}
    np.testing.assert_allclose(probe.coef_, reference.coef_, **close)
    np.testing.assert_allclose(probe.intercept_, reference.intercept_, **close)
    np.testing.assert_allclose(probe.predict_proba(x), reference.predict_proba(x), **close)
    np.testing.assert_allclose(probe.decision_function(x), reference.decision_function(x), **close)
    assert probe.predict(x).dtype == y.dtype
    assert abs(probe.score(x, y) - reference.score(x, y)) <= 1e-3
    logits = probe.to_linear()(torch.from_numpy(x)).softmax(1).detach()
    np.testing.assert_allclose(logits, probe.predict_proba(x), rtol=1e-4, atol=1e-5)


def test_takes_tensors_and_whole_numbers():
    x, y = make_rows(4)
    numbers = np.searchsorted(np.sort(NAMES), y) + 7
    probe = LogisticProbe().fit(torch.from_numpy(x).double(), torch.from_numpy(numbers))
    assert probe.classes_.tolist() == [7, 8, 9, 10]
    assert probe.score(torch.from_numpy(x), torch.from_numpy(numbers)) > 0.5


def test_path_is_chosen_on_validation_rows_alone():
    x, y = make_rows(2)
    few, labels = x[:40], y[:40]
    held_out = make_rows(2, seed=1)
    Cs = [100.0, 1e-6, 0.1, 1.0]
    probe = LogisticProbe(Cs).fit(few, labels, validation=Validation(*held_out))
    alone = [LogisticProbe(C).fit(few, labels).score(*held_out) for C in Cs]
    assert [value for _, value in probe.path_] == pytest.approx(alone)
    assert [one.C for one, _ in probe.path_] == Cs
    assert probe.score(*held_out) == pytest.approx(max(alone))
    # Labels turned round on the validation rows turn the choice round: it is made there.
    other = np.where(held_out[1] == "owl", "ant", "owl")
    turned = LogisticProbe(Cs).fit(few, labels, validation=Validation(held_out[0], other))
    assert turned.C_ != probe.C_
    assert turned.score(held_out[0], other) == pytest.approx(1 - min(alone))


def test_equal_scores_take_the_strongest_penalty():
    x = np.repeat(np.float32([[-1], [1]]), 20, axis=0)
    y = np.repeat([0, 1], 20)
    probe = LogisticProbe([10.0, 0.5, 2.0]).fit(x, y, validation=Validation(x, y))
    assert probe.C_ == 0.5


def test_worst_group_chooses_by_it():
    x, y = make_rows(2)
    held_out, labels = make_rows(2, seed=1)
    groups = np.where(held_out[:, 0] > 0, "sea", "land")
    rows = Validation(held_out, labels, groups)
    probe = LogisticProbe([1e-4, 1.0], criterion="worst_group").fit(x, y, validation=rows)
    for (one, value), C in zip(probe.path_, [1e-4, 1.0], strict=True):
        right = LogisticProbe(C).fit(x, y).predict(held_out) == labels
        expected = min(right[groups == name].mean() for name in ("sea", "land"))
        assert (one.C, value) == (C, pytest.approx(expected))


def test_scores_are_those_of_plain_loops():
    draw = torch.Generator().manual_seed(0)
    labels, predicted, groups = torch.randint(3, (3, 200), generator=draw)
    groups = groups * 5 - 2  # numbers that are no places
    assert score(predicted, labels) == pytest.approx((predicted == labels).double().mean().item())
    expected = balanced_accuracy_score(labels, predicted)
    assert score(predicted, labels, "balanced_accuracy") == pytest.approx(expected)
    worst = min(
        sum(int(p == y) for p, y, g in zip(predicted, labels, groups, strict=True) if g == group)
        / sum(int(g == group) for g in groups)
        for group in (-2, 3, 8)
    )
    assert score(predicted, labels, "worst_group", groups) == pytest.approx(worst)
    assert best([0.1, 0.7, 0.7]) == 1
    with pytest.raises(DataError, match="cannot choose"):
        best([0.1, float("nan")])


def test_says_what_did_not_converge(caplog: pytest.LogCaptureFixture):
    x, y = make_rows(4)
    with caplog.at_level(logging.WARNING):
        LogisticProbe(1e3, max_iter=1).fit(x, y)
    assert "C=1000: stopped after 1 iterations" in caplog.text


def make_tasks(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three labels, none of them a function of the others; the last one is rare."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(600, 5))
    noise = draw.normal(size=(600, 3))
    y = (x[:, :3] + x[:, 1:4] / 2 + noise > np.array([0, -0.5, 1.8])).astype(int)
    return x.astype(np.float32), y


def test_several_labels_have_the_shapes_and_values_of_sklearn():
    x, y = make_tasks()
    probe = LogisticProbe(0.3, tol=1e-9).fit(x, y)
    reference = OneVsRestClassifier(LogisticRegression(C=0.3, tol=1e-9, max_iter=9999))
    reference.fit(x.astype(np.float64), y)
    close = {"rtol": 2e-3, "atol": 2e-3}
    assert probe.classes_.tolist() == reference.classes_.tolist()
    np.testing.assert_allclose(probe.predict_proba(x), reference.predict_proba(x), **close)
    np.testing.assert_allclose(probe.decision_function(x), reference.decision_function(x), **close)
    np.testing.assert_array_equal(probe.predict(x), reference.predict(x))
    assert probe.score(x, y) == pytest.approx(reference.score(x, y))
    logits = probe.to_linear()(torch.from_numpy(x)).sigmoid().detach()
    np.testing.assert_allclose(logits, probe.predict_proba(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [None, "balanced", {0: 1.0, 1: 3.0}])
def test_several_labels_are_one_probe_for_each(weight: object):
    x, y = make_tasks()
    held_out, truth = make_tasks(1)
    groups = np.where(held_out[:, 4] > 0, 1, 0)
    s = np.random.default_rng(5).random(len(x))
    options = {"class_weight": weight, "criterion": "worst_group", "tol": 1e-9}
    Cs = [10.0, 1e-3, 0.1]
    both = LogisticProbe(Cs, **options)  # pyright: ignore
    both.fit(x, y, s, validation=Validation(held_out, truth, groups))
    for task in range(3):
        alone = LogisticProbe(Cs, **options)  # pyright: ignore
        alone.fit(x, y[:, task], s, validation=Validation(held_out, truth[:, task], groups))
        assert np.asarray(both.C_)[task] == alone.C_
        np.testing.assert_allclose(both.coef_[task], alone.coef_[0], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(both.predict(held_out)[:, task], alone.predict(held_out))
        found = both.path_[3 * task : 3 * task + 3]
        assert [value for _, value in found] == [value for _, value in alone.path_]
        assert [one.C for one, _ in found] == Cs


def test_one_column_of_labels_is_one_task():
    x, y = make_tasks()
    one = LogisticProbe().fit(x, y[:, :1])
    assert one.predict(x).shape == one.predict_proba(x).shape == (600, 1)
    np.testing.assert_array_equal(one.predict(x)[:, 0], LogisticProbe().fit(x, y[:, 0]).predict(x))


@pytest.mark.parametrize(
    ("y", "validation", "message"),
    [
        (np.full((600, 2), 2), None, r"labels \[600, 2\] of several tasks: must be"),
        (np.eye(600, 3, k=1) * 0, None, r"the same label in the columns \[0, 1, 2\]"),
        (make_tasks()[1], Validation(make_tasks()[0], make_tasks()[1][:, :2]), "of 2 tasks, the f"),
        (make_tasks()[1], Validation(make_tasks()[0], [0] * 600), "validation labels"),
    ],
)
def test_refuses_labels_of_tasks(y: np.ndarray, validation: Validation | None, message: str):
    with pytest.raises(DataError, match=message):
        LogisticProbe().fit(make_tasks()[0], y, validation=validation)


@pytest.mark.parametrize(
    ("options", "arguments", "kind", "message"),
    [
        ({"C": [1.0, 2.0]}, {}, ConfigError, "needs validation"),
        ({"class_weight": {"owl": 1.0}}, {}, ConfigError, r"no weight for the labels \['ant', 'b"),
        ({"class_weight": "even"}, {}, ConfigError, "'balanced' or a mapping"),
        ({}, {"y": ["owl"] * 900}, DataError, "one class only"),
        ({}, {"sample_weight": [1.0]}, DataError, "1 sample weights for 900"),
        ({}, {"X": np.zeros((900, 2), dtype=int)}, DataError, "floating point"),
        ({}, {"validation": Validation(np.zeros((1, 8)), ["fox"])}, DataError, "'fox'"),
        (
            {"criterion": "worst_group"},
            {"validation": Validation(np.zeros((1, 8)), ["owl"])},
            DataError,
            "group of each",
        ),
        (
            {"criterion": "auc"},
            {"validation": Validation(np.zeros((1, 8)), ["owl"])},
            ConfigError,
            "must be accuracy",
        ),
    ],
)
def test_refuses(
    options: dict[str, object], arguments: dict[str, object], kind: type[Exception], message: str
):
    x, y = make_rows(4)
    with pytest.raises(kind, match=message):
        LogisticProbe(**options).fit(**{"X": x, "y": y, **arguments})  # pyright: ignore

"""Logistic regression as scikit-learn has it (fit, predict, score), for notebooks and jobs."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipattr.errors import ConfigError, DataError
from clipattr.probes.group_rows import GroupRows, predict
from clipattr.probes.linear import LinearProbe, from_columns
from clipattr.probes.logistic import Solution, solve_path
from clipattr.probes.selection import best, score

logger = logging.getLogger(__name__)

ClassWeight = str | Mapping[Any, float] | None
"""'balanced' gives every class the same total; or one weight for each label."""


class Validation(NamedTuple):
    """Rows on which C is chosen, never those of the fit."""

    features: Any
    labels: Any
    groups: Any = None


class LogisticProbe:
    """Linear classifier on features: scikit-learn's LogisticRegression(C), and a path over C.

    Labels may be anything numpy can sort. Features are an array or a tensor; a tensor is used where
    it is. Results are numpy arrays.

    Labels [row, task] of 0 and 1 are several independent tasks, solved in the same passes, each
    with a C of its own; results then have the shapes of scikit-learn's OneVsRestClassifier.
    """

    classes_: np.ndarray
    """labels; of several tasks their numbers"""
    coef_: np.ndarray
    """[column, feature]: a column for each class (two classes: one) or task"""
    intercept_: np.ndarray
    C_: float | np.ndarray
    """the one that was chosen; of several tasks that of each"""
    path_: list[tuple[Solution, float]]
    """each solution with its score on the validation rows (nan without), task after task"""
    is_multilabel_: bool

    def __init__(
        self,
        C: float | Sequence[float] | np.ndarray = 1.0,
        *,
        standardise: bool = False,
        class_weight: ClassWeight = None,
        criterion: str = "accuracy",
        tol: float = 1e-5,
        max_iter: int = 1000,
    ) -> None:
        """Nothing is fitted yet.

        Args:
            C: inverse strength of the penalty, or several to choose from.
            standardise: penalise weights of features of unit variance; the result takes raw ones.
            class_weight: what the rows of each class count.
            criterion: by which one of several C is chosen on the validation rows.
            tol: largest estimated distance to the minimum, as a share of the objective.
            max_iter: iterations for each C.
        """
        self.Cs = [float(one) for one in np.atleast_1d(np.asarray(C, dtype=float))]
        self.standardise = standardise
        self.class_weight = class_weight
        self.criterion = criterion
        self.tol = tol
        self.max_iter = max_iter

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, validation: Validation | None = None
    ) -> "LogisticProbe":
        """Solve for every C and keep the best on `validation`, which several need."""
        if len(self.Cs) > 1 and validation is None:
            raise ConfigError(f"C={self.Cs}: to choose among several, fit needs validation rows")
        features, labels = _features(X), _array(y)
        self.is_multilabel_ = labels.ndim == 2
        if self.is_multilabel_:
            self._fit_tasks(features, labels, sample_weight, validation)
        else:
            self._fit_classes(features, labels, sample_weight, validation)
        for one, _ in self.path_:
            if not one.converged:
                logger.warning(
                    "C=%g: stopped after %d iterations, %.1e of the objective above its minimum "
                    "(estimate); raise max_iter, or penalise more",
                    *(one.C, one.n_iterations, one.gap),
                )
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits [row, class] or [row, task]; of two classes that of the second, [row]."""
        features = _features(X)
        weight = torch.as_tensor(self.coef_, dtype=torch.float32, device=features.device)
        bias = torch.as_tensor(self.intercept_, dtype=torch.float32, device=features.device)
        logits = torch.addmm(bias, features.float(), weight.T).cpu().numpy()
        return logits[:, 0] if self._is_binary else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [row, class], or of a yes [row, task]."""
        logits = torch.from_numpy(self.decision_function(X)).double()
        if self.is_multilabel_:
            return logits.sigmoid().numpy()
        if logits.ndim == 1:
            logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
        return logits.softmax(dim=1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The label with the largest logit, or 0 and 1 for each task."""
        logits = self.decision_function(X)
        if self.is_multilabel_:
            return (logits > 0).astype(int)
        is_binary = logits.ndim == 1
        return self.classes_[(logits > 0).astype(int) if is_binary else logits.argmax(axis=1)]

    def score(self, X: Any, y: Any) -> float:
        """Share of rows whose label, or labels of all tasks, are predicted."""
        is_right = self.predict(X) == _array(y)
        return float((is_right.all(axis=1) if self.is_multilabel_ else is_right).mean())

    def to_linear(self) -> LinearProbe:
        """The same probabilities as a module; two classes get half the logit each."""
        weight, bias = torch.as_tensor(self.coef_), torch.as_tensor(self.intercept_)
        return from_columns(weight, bias, len(self.classes_))

    @property
    def _is_binary(self) -> bool:
        return len(self.classes_) == 2 and not self.is_multilabel_

    def _fit_classes(
        self, features: Tensor, y: np.ndarray, sample_weight: Any, validation: Validation | None
    ) -> None:
        self.classes_, numbers = np.unique(y, return_inverse=True)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise DataError(f"labels of one class only, {self.classes_.tolist()}: nothing to learn")
        labels = torch.as_tensor(numbers, device=features.device)
        solutions = solve_path(
            features,
            labels[:, None].float() if n_classes == 2 else labels,
            self.Cs,
            n_classes=None if n_classes == 2 else n_classes,
            weights=self._weights(labels, self.classes_.tolist(), sample_weight),
            standardise=self.standardise,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        known = None if validation is None else _number(validation, self.classes_)
        one, self.path_ = self._choose([one for (one,) in solutions], known)
        self._take([one])
        self.C_ = one.C

    def _fit_tasks(
        self, features: Tensor, y: np.ndarray, sample_weight: Any, validation: Validation | None
    ) -> None:
        targets = _tasks(y, "").to(features.device)
        self.classes_ = np.arange(targets.shape[1])
        if fixed := [i for i, one in enumerate(targets.T) if bool((one == one[0]).all())]:
            raise DataError(
                f"all rows have the same label in the columns {fixed}: nothing to learn"
            )
        known = None if validation is None else _number_tasks(validation, targets.shape[1])
        chosen: list[Solution] = []
        self.path_ = []
        for task, solutions in enumerate(self._solve_tasks(features, targets, sample_weight)):
            rows = None if known is None else known._replace(labels=known.labels[:, task])
            one, path = self._choose(solutions, rows)
            chosen.append(one)
            self.path_ += path
        self._take(chosen)
        self.C_ = np.array([one.C for one in chosen])

    def _solve_tasks(
        self, features: Tensor, targets: Tensor, sample_weight: Any
    ) -> list[list[Solution]]:
        """The path of each task; in the same passes where rows count alike in all of them."""
        is_shared = self.class_weight is None
        paths: list[list[Solution]] = []
        for columns in [targets] if is_shared else targets.split(1, dim=1):
            labels = columns[:, 0].long()
            found = solve_path(
                features,
                columns,
                self.Cs,
                weights=self._weights(labels, [0, 1], sample_weight),
                standardise=self.standardise,
                tol=self.tol,
                max_iter=self.max_iter,
            )
            paths += [list(one) for one in zip(*found, strict=True)]
        return paths

    def _choose(
        self, solutions: Sequence[Solution], validation: GroupRows | None
    ) -> tuple[Solution, list[tuple[Solution, float]]]:
        """The best, of equals that of the strongest penalty, and all with their scores."""
        if validation is None:
            return solutions[0], [(one, float("nan")) for one in solutions]
        x, labels, groups = validation
        scores = [score(predict(one, x), labels, self.criterion, groups) for one in solutions]
        order = sorted(range(len(solutions)), key=lambda i: solutions[i].C)
        chosen = order[best([scores[i] for i in order])]
        return solutions[chosen], list(zip(solutions, scores, strict=True))

    def _take(self, columns: Sequence[Solution]) -> None:
        self.coef_ = torch.cat([one.weight for one in columns]).cpu().numpy()
        self.intercept_ = torch.cat([one.bias for one in columns]).cpu().numpy()

    def _weights(self, labels: Tensor, classes: list[Any], sample_weight: Any) -> Tensor:
        """Of rows: their own times that of their class."""
        weights = torch.ones(len(labels))
        if sample_weight is not None:
            weights = torch.as_tensor(_array(sample_weight)).float()
        weights = weights.to(labels.device)
        if len(weights) != len(labels):
            raise DataError(f"{len(weights)} sample weights for {len(labels)} rows")
        n_classes = len(classes)
        match self.class_weight:
            case None:
                return weights
            case "balanced":
                counts = torch.bincount(labels, weights.double(), minlength=n_classes)
                of_class = counts.sum() / (n_classes * counts)
            case Mapping() as given:
                if missing := [one for one in classes if one not in given]:
                    raise ConfigError(f"class_weight has no weight for the labels {missing}")
                of_class = torch.tensor([float(given[one]) for one in classes])
            case other:
                raise ConfigError(f"class_weight={other!r}: must be None, 'balanced' or a mapping")
        return (weights * of_class.to(labels.device)[labels]).float()


def _array(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _number(rows: Validation, classes: np.ndarray) -> GroupRows:
    """Labels as numbers of the classes."""
    labels = _array(rows.labels)
    if unknown := sorted(set(labels.tolist()) - set(classes.tolist())):
        raise DataError(f"validation rows have labels that the fit has not: {unknown}")
    return _held_out(rows, torch.as_tensor(np.searchsorted(classes, labels)))


def _number_tasks(rows: Validation, n_tasks: int) -> GroupRows:
    labels = _tasks(_array(rows.labels), "validation ").long()
    if labels.shape[1] != n_tasks:
        raise DataError(f"validation labels of {labels.shape[1]} tasks, the fit has {n_tasks}")
    return _held_out(rows, labels)


def _held_out(rows: Validation, labels: Tensor) -> GroupRows:
    features, groups = _features(rows.features), None
    if rows.groups is not None:
        groups = torch.as_tensor(np.unique(_array(rows.groups), return_inverse=True)[1])
        groups = groups.to(features.device)
    return GroupRows(features, labels.to(features.device), groups)


def _tasks(labels: np.ndarray, which: str) -> Tensor:
    """[row, task], 0 and 1."""
    if labels.ndim != 2 or not np.isin(labels, (0, 1)).all():
        raise DataError(
            f"{which}labels {list(labels.shape)} of several tasks: must be [row, task] of 0 and 1"
        )
    return torch.as_tensor(labels.astype(np.float32))


def _features(X: Any) -> Tensor:
    features = X.detach() if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X))
    if features.ndim != 2 or not features.is_floating_point():
        raise DataError(
            f"features are {features.dtype} {list(features.shape)}: must be floating point, "
            "[row, feature]"
        )
    return features

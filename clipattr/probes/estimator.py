"""Logistic regression as scikit-learn has it (fit, predict, score), for notebooks and jobs."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipattr.errors import ConfigError, DataError
from clipattr.probes.linear import LinearProbe
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
    """

    classes_: np.ndarray
    coef_: np.ndarray
    intercept_: np.ndarray
    C_: float
    path_: list[tuple[Solution, float]]
    """each solution with its score on the validation rows (nan without)"""

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
        features = _features(X)
        self.classes_, numbers = np.unique(_array(y), return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"labels of one class only, {self.classes_.tolist()}: nothing to learn")
        labels = torch.as_tensor(numbers, device=features.device)
        is_binary = len(self.classes_) == 2
        solutions = solve_path(
            features,
            labels[:, None].float() if is_binary else labels,
            self.Cs,
            n_classes=None if is_binary else len(self.classes_),
            weights=self._weights(labels, sample_weight),
            standardise=self.standardise,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self._choose([one for (one,) in solutions], validation)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits [row, class]; of two classes that of the second, [row]."""
        features = _features(X)
        weight = torch.as_tensor(self.coef_, dtype=torch.float32, device=features.device)
        bias = torch.as_tensor(self.intercept_, dtype=torch.float32, device=features.device)
        logits = torch.addmm(bias, features.float(), weight.T).cpu().numpy()
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [row, class]."""
        logits = torch.from_numpy(self.decision_function(X)).double()
        if logits.ndim == 1:
            logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
        return logits.softmax(dim=1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The label with the largest logit."""
        return self.classes_[self._predict(X)]

    def score(self, X: Any, y: Any) -> float:
        """Share of rows whose label is predicted."""
        return float((self.predict(X) == _array(y)).mean())

    def to_linear(self) -> LinearProbe:
        """The same probabilities as a module; two classes get half the logit each."""
        weight, bias = torch.as_tensor(self.coef_), torch.as_tensor(self.intercept_)
        if len(self.classes_) == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        probe = LinearProbe(weight.shape[1], len(self.classes_))
        with torch.no_grad():
            probe.weight.copy_(weight)
            probe.bias.copy_(bias)
        return probe

    def _predict(self, X: Any) -> np.ndarray:
        logits = self.decision_function(X)
        return (logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)

    def _choose(self, solutions: list[Solution], validation: Validation | None) -> None:
        scores = [
            float("nan") if validation is None else self._score(s, validation) for s in solutions
        ]
        # The strongest penalty of equally good ones.
        order = sorted(range(len(solutions)), key=lambda i: solutions[i].C)
        chosen = order[0 if validation is None else best([scores[i] for i in order])]
        self._take(solutions[chosen])
        self.path_ = list(zip(solutions, scores, strict=True))
        for one in solutions:
            if not one.converged:
                logger.warning(
                    "C=%g: stopped after %d iterations, %.1e of the objective above its minimum "
                    "(estimate); raise max_iter, or penalise more",
                    *(one.C, one.n_iterations, one.gap),
                )

    def _take(self, solution: Solution) -> None:
        self.C_ = solution.C
        self.coef_ = solution.weight.cpu().numpy()
        self.intercept_ = solution.bias.cpu().numpy()

    def _score(self, solution: Solution, rows: Validation) -> float:
        self._take(solution)
        labels = _array(rows.labels)
        if unknown := sorted(set(labels.tolist()) - set(self.classes_.tolist())):
            raise DataError(f"validation rows have labels that the fit has not: {unknown}")
        groups = rows.groups
        if groups is not None:
            groups = torch.as_tensor(np.unique(_array(groups), return_inverse=True)[1])
        return score(
            torch.as_tensor(self._predict(rows.features)),
            torch.as_tensor(np.searchsorted(self.classes_, labels)),
            self.criterion,
            groups,
        )

    def _weights(self, labels: Tensor, sample_weight: Any) -> Tensor:
        """Of rows: their own times that of their class."""
        weights = torch.ones(len(labels))
        if sample_weight is not None:
            weights = torch.as_tensor(_array(sample_weight)).float()
        weights = weights.to(labels.device)
        if len(weights) != len(labels):
            raise DataError(f"{len(weights)} sample weights for {len(labels)} rows")
        n_classes = len(self.classes_)
        match self.class_weight:
            case None:
                return weights
            case "balanced":
                counts = torch.bincount(labels, weights.double(), minlength=n_classes)
                of_class = counts.sum() / (n_classes * counts)
            case Mapping() as given:
                if missing := [one for one in self.classes_.tolist() if one not in given]:
                    raise ConfigError(f"class_weight has no weight for the labels {missing}")
                of_class = torch.tensor([float(given[one]) for one in self.classes_.tolist()])
            case other:
                raise ConfigError(f"class_weight={other!r}: must be None, 'balanced' or a mapping")
        return (weights * of_class.to(labels.device)[labels]).float()


def _array(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _features(X: Any) -> Tensor:
    features = X.detach() if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X))
    if features.ndim != 2 or not features.is_floating_point():
        raise DataError(
            f"features are {features.dtype} {list(features.shape)}: must be floating point, "
            "[row, feature]"
        )
    return features

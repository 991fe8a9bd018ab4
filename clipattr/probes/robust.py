"""Linear probes for groups: five ways to fit one on cached features.

A group is one label with one state of a cue. What is chosen, is chosen on validation rows alone.
"""

from collections.abc import Sequence
from functools import partial

from clipattr.errors import ConfigError, DataError
from clipattr.probes.group_dro import fit_group_dro
from clipattr.probes.group_rows import (
    Candidate,
    Fitted,
    GroupRows,
    Trial,
    check_rows,
    choose,
    need_groups,
)
from clipattr.probes.linear import LinearProbe
from clipattr.probes.resampling import UPWEIGHTS, balance, fit_subsets, fit_twice, fit_weighted

__all__ = ["METHODS", "Fitted", "GroupRows", "Trial", "fit_groups"]

METHODS = ("erm", "balanced", "group_dro", "dfr", "jtt")


def fit_groups(
    method: str,
    rows: GroupRows,
    *,
    n_classes: int,
    Cs: Sequence[float],
    validation: GroupRows | None = None,
    criterion: str = "worst_group",
    standardise: bool = False,
    seed: int = 0,
    start: LinearProbe | None = None,
    upweights: Sequence[float] = UPWEIGHTS,
    by_loss: bool = False,
    n_groups: int | None = None,
) -> Fitted:
    """Fit for every C (and setting of the method); the best on `validation`, for raw features.

    erm: every row counts alike. balanced: every group counts alike, rows weighted by 1 / size of
    their group, which is the full-batch equal of drawing groups alike. group_dro: the group with
    the largest mean loss counts. dfr: mean of fits on random subsets with as many of each group.
    jtt: rows that a first model gets wrong count more.

    Args:
        method: one of METHODS.
        rows: to fit on, all of them; groups are needed by balanced, group_dro and dfr.
        n_classes: of the labels.
        Cs: inverse strengths of the penalty, as those of `solve_path`; the penalty of one C is
            the same for all methods.
        validation: rows to choose on, never those of the fit; needed unless one fit is asked for.
        criterion: accuracy, balanced_accuracy or worst_group, which needs groups there.
        standardise: penalise the weights of features of unit variance; dfr always does.
        seed: of the subsets of dfr.
        start: first model of jtt in place of fitted ones; others end where they do from any start.
        upweights: of jtt, to choose from.
        by_loss: of the fits within one standard error of the best on `validation`, take that with
            the smallest log loss there, and not the strongest penalty of the best.
        n_groups: all of them need rows; None: the largest number that occurs is the last one.
    """
    _check_method(method, start)
    _check(rows, validation, n_classes)
    path = partial(fit_weighted, rows, n_classes, Cs, standardise=standardise)
    groups = partial(need_groups, rows, validation, method, n_groups=n_groups)
    candidates: list[Candidate]
    match method:
        case "erm":
            candidates = [Candidate(one, {}) for one in path()]
        case "balanced":
            candidates = [Candidate(one, {}) for one in path(weights=balance(groups()))]
        case "group_dro":
            candidates = fit_group_dro(rows, groups(), n_classes, Cs, standardise=standardise)
        case "dfr":
            candidates = fit_subsets(rows, groups(least=2), n_classes, Cs, seed=seed)
        case _:  # jtt, as checked above
            candidates = fit_twice(
                rows, n_classes, Cs, upweights=upweights, standardise=standardise, start=start
            )
    return choose(candidates, validation, criterion=criterion, n_classes=n_classes, by_loss=by_loss)


def _check_method(method: str, start: LinearProbe | None) -> None:
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    if start is not None and method != "jtt":
        raise ConfigError(f"method {method} takes no start: it ends where it does from any")


def _check(rows: GroupRows, validation: GroupRows | None, n_classes: int) -> None:
    check_rows(rows, n_classes, "fitted")
    if int(rows.labels.min()) == int(rows.labels.max()):
        raise DataError(f"all rows have the label {int(rows.labels[0])}: nothing to learn")
    if validation is None:
        return
    check_rows(validation, n_classes, "validation")
    if validation.features.shape[1] != rows.features.shape[1]:
        raise DataError(
            f"fitted rows have {rows.features.shape[1]} features, validation rows "
            f"{validation.features.shape[1]}"
        )

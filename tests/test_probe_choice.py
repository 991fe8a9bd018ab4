"""What is chosen by, on rows of which some are unknown, broken or have several labels."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from clipattr.config.choices import ClassWeight, GroupMethod, Solver
from clipattr.config.probe import ProbeConfig
from clipattr.errors import DataError
from clipattr.jobs.probe_choice import Candidate, choose, describe_quality, score_head, towards_text
from clipattr.jobs.probe_convex import balance_classes, fit_method, fit_path
from clipattr.jobs.probe_features import FeatureRows
from clipattr.jobs.probe_sets import ProbeRows
from clipattr.jobs.probe_sgd import measure_standard
from clipattr.probes import GroupRows, LinearProbe, fit_groups

CLASSES = ("a", "b", "c")


def make_rows(targets: Tensor, has: Tensor | None = None, known: Tensor | None = None) -> ProbeRows:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(len(targets), 4, generator=draw)
    found = FeatureRows(x, torch.arange(len(x)), "f", [])
    return ProbeRows(x, targets, has, known, found)


def head_of(seed: int, n_classes: int = 3) -> LinearProbe:
    probe = LinearProbe(4, n_classes)
    torch.nn.init.normal_(probe.weight, generator=torch.Generator().manual_seed(seed))
    return probe


@pytest.fixture
def rows() -> ProbeRows:
    draw = torch.Generator().manual_seed(4)
    labels = torch.randint(3, (60,), generator=draw)
    has, known = torch.rand(2, 60, generator=draw) < torch.tensor([[0.5], [0.8]])
    return make_rows(labels, has & known, known)


@torch.no_grad()
def test_unknown_cues_count_for_no_group(rows: ProbeRows):
    logits = head_of(0)(rows.x)
    right = logits.argmax(1) == rows.targets
    groups = [
        right[rows.known & (rows.targets == label) & (rows.has_cue == has)].double().mean().item()
        for label in range(3)
        for has in (False, True)
    ]
    assert score_head(logits, rows, "worst_group") == pytest.approx(min(groups))
    assert score_head(logits, rows, "accuracy") == pytest.approx(right.double().mean().item())
    found = describe_quality(head_of(0), rows, CLASSES)
    assert found["worst_group"] == pytest.approx(min(groups))
    assert found["groups"]["b"] == pytest.approx({"without": groups[2], "with": groups[3]})
    known = rows.of_known_groups()
    assert torch.equal(known.x, rows.x[rows.known])
    assert torch.equal(known.groups, (rows.targets * 2 + rows.has_cue)[rows.known])


def test_methods_leave_unknown_cues_out(rows: ProbeRows):
    settings = ProbeConfig(classes=list(CLASSES), solver=Solver.lbfgs, C=[1.0])
    settings.method = GroupMethod.balanced
    choice = fit_method(settings, rows, None, seed=0)
    known = rows.known
    plain = GroupRows(rows.x[known], rows.targets[known], (rows.targets * 2 + rows.has_cue)[known])
    wanted = fit_groups("balanced", plain, n_classes=3, Cs=[1.0]).probe
    assert torch.equal(choice.head.weight, wanted.weight)
    assert choice.path[0]["chosen"]


@torch.no_grad()
def test_a_head_that_is_not_finite_is_wrong_everywhere():
    labels = torch.tensor([0, 0, 1, 2])
    rows = make_rows(labels)
    broken = torch.full((4, 3), float("nan"))
    assert score_head(broken, rows, "accuracy") == 0
    several = make_rows(torch.zeros(4, 2))
    assert score_head(torch.full((4, 2), float("nan")), several, "accuracy") == 0
    assert score_head(-torch.ones(4, 2), several, "accuracy") == 1


@torch.no_grad()
def test_several_labels_are_means():
    draw = torch.Generator().manual_seed(5)
    targets = (torch.rand(40, 3, generator=draw) < 0.4).float()
    rows = make_rows(targets)
    logits = head_of(1)(rows.x)
    right = ((logits > 0) == (targets > 0)).double()
    assert score_head(logits, rows, "accuracy") == pytest.approx(right.mean().item())
    found = describe_quality(head_of(1), rows, CLASSES)
    assert found["accuracy"] == pytest.approx(right.mean().item())
    assert found["labels"]["c"]["accuracy"] == pytest.approx(right[:, 2].mean().item())


def test_of_equals_the_first_is_kept(rows: ProbeRows):
    head = head_of(2)
    candidates = [Candidate(head, {"C": C}, {}) for C in (0.1, 1.0)]
    assert choose(candidates, rows, "accuracy").settings == {"C": 0.1}
    choice = choose(candidates[1:], None, "accuracy")
    assert choice.path[0]["chosen"]
    towards = towards_text(choice, head, [1.0, 0.5], rows, "accuracy")
    assert towards.settings == {"C": 1.0, "alpha": 0.5}
    assert [row["chosen"] for row in towards.path] == [False, True, False]


def test_moments_are_those_of_all_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clipattr.jobs.probe_sgd._BLOCK", 7)
    x = 3 + torch.randn(10, 5, 4, generator=torch.Generator().manual_seed(6))
    x[..., 2] = 8.0
    shift, factor = measure_standard(x.half())
    rows = x.half().double().flatten(0, 1)
    torch.testing.assert_close(shift, rows.mean(0).float())
    expected = 1 / rows.std(0, correction=0)
    expected[2] = 1
    torch.testing.assert_close(factor, expected.float())


def test_class_weights_are_those_of_sklearn():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    found = balance_classes(labels, 3, ClassWeight.balanced)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert found.tolist() == pytest.approx(expected.tolist())
    several = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert balance_classes(several, 2, ClassWeight.balanced).tolist() == [3.0, 1.0]
    assert balance_classes(labels, 3, ClassWeight.none) is None


@pytest.mark.parametrize("targets", [torch.ones(5).long(), torch.tensor([[1.0, 0.0]] * 5)])
def test_one_label_only_is_refused(targets: Tensor):
    settings = ProbeConfig(classes=["a", "b"], solver=Solver.lbfgs)
    with pytest.raises(DataError, match="nothing to learn"):
        fit_path(settings, make_rows(targets), "cpu")

"""The quality of a classifier, against scikit-learn, torchmetrics and plain loops."""

import math
from decimal import Decimal, localcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torchmetrics.functional.classification import multiclass_calibration_error

from clipattr.errors import DataError
from clipattr.metrics.calibration import calibration_bins
from clipattr.metrics.groups import GroupCounts
from clipattr.metrics.quality import Quality, QualityMetric, log_odds, measure_quality
from clipattr.metrics.ranks import auroc


class Rows(NamedTuple):
    """Made-up predictions."""

    logits: Float[Tensor, "image class"]
    labels: Int[Tensor, " image"]
    has_cue: Bool[Tensor, " image"]
    known: Bool[Tensor, " image"]

    @property
    def probabilities(self) -> Float[Tensor, "image class"]:
        """What other libraries are given."""
        return self.logits.softmax(dim=1)


def make_rows(n_classes: int, n_images: int = 400, seed: int = 0) -> Rows:
    """Better than chance; the cue is known of three images in four."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n_images,), generator=generator)
    logits = torch.randn(n_images, n_classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(n_images), labels] += 0.7
    has_cue, known = (torch.rand(n_images, generator=generator) < share for share in (0.3, 0.75))
    return Rows(logits, labels, has_cue, known)


def measure(rows: Rows, part: Tensor | slice = slice(None)) -> Quality:
    return measure_quality(
        rows.logits[part],
        rows.labels[part],
        has_cue=rows.has_cue[part],
        known=rows.known[part],
    )


def plain_ece(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 15) -> float:
    if len(labels) == 0:
        return math.nan
    total = 0.0
    for number in range(n_bins):
        low, high = number / n_bins, (number + 1) / n_bins
        hits, confidences = [], []
        for row, label in zip(probabilities, labels, strict=True):
            top = row.max()
            if low <= top < high or (number == n_bins - 1 and top == 1.0):
                hits.append(float(row.argmax() == label))
                confidences.append(top)
        if hits:
            share = len(hits) / len(labels)
            total += share * abs(np.mean(hits) - np.mean(confidences))
    return total


def sklearn_auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))


@pytest.mark.parametrize("n_classes", [2, 5])
def test_averages_equal_scikit_learn(n_classes: int):
    rows = make_rows(n_classes)
    found = measure(rows)
    probabilities, labels = rows.probabilities.numpy(), rows.labels.numpy()
    predictions = probabilities.argmax(axis=1)
    assert found.accuracy == pytest.approx(accuracy_score(labels, predictions), abs=1e-15)
    assert found.balanced_accuracy == pytest.approx(
        balanced_accuracy_score(labels, predictions), abs=1e-15
    )
    assert found.auroc == pytest.approx(sklearn_auroc(probabilities, labels), abs=1e-12)
    if n_classes == 2:
        column = (rows.logits[:, 1] - rows.logits[:, 0])[:, None]
        assert found.auroc == auroc(column, rows.labels == 1).item()


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("has", [True, False])
def test_with_and_without_the_cue_are_those_of_the_known_images_alone(n_classes: int, has: bool):
    rows = make_rows(n_classes)
    found = measure(rows)
    part = (rows.known & (rows.has_cue == has)).numpy()
    probabilities, labels = rows.probabilities.numpy()[part], rows.labels.numpy()[part]
    of_auroc, of_ece = (
        (found.auroc_with, found.ece_with) if has else (found.auroc_without, found.ece_without)
    )
    assert of_auroc == pytest.approx(sklearn_auroc(probabilities, labels), abs=1e-12)
    assert of_ece == pytest.approx(plain_ece(probabilities, labels), abs=1e-12)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_groups_equal_a_plain_loop(n_classes: int):
    rows = make_rows(n_classes)
    right, total = np.zeros((n_classes, 2), int), np.zeros((n_classes, 2), int)
    for logits, label, has_cue, known in zip(*rows, strict=True):
        if known:
            total[label, int(has_cue)] += 1
            right[label, int(has_cue)] += int(logits.argmax() == label)
    found = measure(rows)
    assert found.counts is not None
    assert found.counts.correct.tolist() == right.tolist()
    assert found.counts.total.tolist() == total.tolist()
    assert found.worst_group == (right / total).min()
    assert found.gap == pytest.approx(right.sum() / total.sum() - (right / total).min(), abs=1e-15)


def test_calibration_error_equals_a_plain_loop_and_torchmetrics():
    rows = make_rows(5)
    found = measure(rows).ece
    assert found == pytest.approx(
        plain_ece(rows.probabilities.numpy(), rows.labels.numpy()), abs=1e-12
    )
    theirs = multiclass_calibration_error(rows.probabilities, rows.labels, 5, n_bins=15)
    assert found == pytest.approx(theirs.item(), abs=1e-6)


def test_certainty_belongs_to_the_last_bin():
    # torchmetrics 1.9 has a bin of its own for it, in which 1.0 and 0.95 do not offset each other.
    confidence = torch.tensor([1.0, 0.95, 0.0], dtype=torch.float64)
    bins = calibration_bins(confidence, torch.tensor([False, True, True]), n_bins=10)
    assert bins.images.tolist() == [1, *[0] * 8, 2]
    assert bins.accuracy[9] == 0.5
    assert bins.confidence[9] == 0.975
    assert bins.accuracy[4].isnan()
    # An edge belongs to the bin above it.
    assert calibration_bins(torch.tensor([0.5]), torch.tensor([True]), n_bins=4).images[2] == 1
    assert bins.error == pytest.approx(1 / 3 * 1.0 + 2 / 3 * 0.475)


def test_the_order_of_the_images_changes_no_bit():
    rows = make_rows(4, seed=3)
    mixed = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    one, other = measure(rows), measure(rows, mixed)
    assert_same(one, other)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_what_is_not_defined_is_nan(n_classes: int):
    rows = make_rows(n_classes)
    without_cue = measure_quality(rows.logits, rows.labels)
    of_cue = without_cue[4:-1]
    assert len(of_cue) == 6
    assert all(math.isnan(number) for number in of_cue)
    assert without_cue.counts is None
    nowhere = torch.zeros(400, dtype=torch.bool)
    unknown = measure_quality(rows.logits, rows.labels, has_cue=rows.has_cue, known=nowhere)
    assert_same(unknown, without_cue)
    one_label = measure_quality(rows.logits, rows.labels, has_cue=rows.labels == 0)
    assert math.isnan(one_label.auroc_with)
    assert one_label.ece_with > 0
    assert one_label.worst_group > 0
    no_cue = measure_quality(rows.logits, rows.labels, has_cue=nowhere)
    assert math.isnan(no_cue.ece_with)
    assert math.isnan(no_cue.auroc_with)
    assert no_cue.ece_without == no_cue.ece
    assert no_cue.auroc_without == no_cue.auroc


def test_a_class_without_images_is_left_out_of_the_means():
    rows = make_rows(3)
    wide = torch.cat([rows.logits, torch.full((400, 1), -1e3, dtype=torch.float64)], dim=1)
    assert measure_quality(wide, rows.labels)[:4] == measure_quality(*rows[:2])[:4]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_no_logit_is_refused(broken: float):
    rows = make_rows(3)
    rows.logits[7, 1] = broken
    with pytest.raises(DataError, match="1 of 400 images have a logit that is nan or infinite"):
        measure_quality(rows.logits, rows.labels)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("one", [0, 1])
def test_certainties_are_ranked_where_their_softmax_is_1(n_classes: int, one: int):
    """The softmax of float64 is 1 from a gap of 37 on; the other class must not rank otherwise."""
    logits = torch.zeros(4, n_classes, dtype=torch.float64)
    logits[:, one] = torch.tensor([30.0, 38, 45, 60])
    labels = torch.tensor([1 - one, 1 - one, one, one])
    assert logits.softmax(dim=1)[1:, one].tolist() == [1.0] * 3
    # Of two classes that of the second; of three the two that have images are ranked alike.
    assert measure_quality(logits, labels).auroc == 1.0


def test_log_odds_equal_those_of_exact_fractions():
    logits = [[0.0, 50.0, 3.0], [-700.0, 0.0, 700.0], [2.0, 2.0, 2.0], [1.0, 1.0, -40.0]]
    found = log_odds(torch.tensor(logits, dtype=torch.float64))
    with localcontext(prec=700):
        for row, each in zip(logits, found.tolist(), strict=True):
            powers = [Decimal(one).exp() for one in row]
            for power, value in zip(powers, each, strict=True):
                assert value == pytest.approx(float((power / (sum(powers) - power)).ln()))


def test_wrong_labels_and_no_images_are_refused():
    rows = make_rows(3)
    with pytest.raises(DataError, match=r"labels lie in \[0, 3\], allowed is \[0, 2\]"):
        measure_quality(rows.logits, rows.labels.clone().index_fill_(0, torch.tensor(5), 3))
    with pytest.raises(DataError, match="0 images and 3 classes"):
        measure_quality(rows.logits[:0], rows.labels[:0])
    with pytest.warns(UserWarning, match="compute"), pytest.raises(DataError, match="0 images"):
        QualityMetric(3).compute()


def assert_same(one: Quality, other: Quality) -> None:
    for name, left, right in zip(Quality._fields, one, other, strict=True):
        if isinstance(left, GroupCounts):
            assert [each.tolist() for each in left] == [each.tolist() for each in right], name
        else:
            assert left == right or math.isnan(left) and math.isnan(right), name


def fill(metric: QualityMetric, rows: Rows, parts: list[Tensor]) -> Quality:
    for part in parts:
        metric.update(*(column[part] for column in rows))
    return metric.compute()


def test_batches_in_any_order_give_what_all_images_give():
    rows = make_rows(3)
    parts = list(torch.arange(400).split(37))
    for order in (parts, parts[::-1]):
        assert_same(fill(QualityMetric(3), rows, order), measure(rows))
    metric = QualityMetric(3)
    metric.update(rows.logits, rows.labels)
    assert_same(metric.compute(), measure_quality(rows.logits, rows.labels))


def run_process(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    rows = make_rows(3)
    shares = {"halves": torch.arange(400).chunk(2)[rank], "one": torch.arange(400 * (1 - rank))}
    found = {
        name: tuple(fill(QualityMetric(3), rows, [share] if len(share) else []))
        for name, share in shares.items()
    }
    torch.save({name: [*each[:-1], *each[-1]] for name, each in found.items()}, f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    spawn(run_process, args=(str(tmp_path),), nprocs=2)
    wanted = measure(make_rows(3))
    for rank in range(2):
        for found in torch.load(tmp_path / str(rank)).values():
            assert_same(Quality(*found[:-2], counts=GroupCounts(*found[-2:])), wanted)

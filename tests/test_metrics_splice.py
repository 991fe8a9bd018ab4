"""Losses of a splice and the activity of latents, each number against a plain float64 loop."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from clipattr.codes import SparseCodes
from clipattr.errors import DataError
from clipattr.metrics.latent_activity import EDGES, LatentActivity, frequency_histogram
from clipattr.metrics.splice import Measure, Outcome, SpliceLoss

N_IMAGES, N_CLASSES, WIDTH = 23, 7, 5
Variants = tuple[Outcome, Outcome, Outcome]


def outcomes(n_classes: int = N_CLASSES, seed: int = 0) -> tuple[Variants, Tensor]:
    """Three variants, the second near the first, and labels that the first mostly finds."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(N_IMAGES, WIDTH, generator=generator)
    logits = 4 * torch.randn(N_IMAGES, n_classes, generator=generator) - 2
    labels = torch.where(torch.arange(N_IMAGES) % 3 > 0, logits.argmax(1), 0)
    noise = [torch.randn(N_IMAGES, WIDTH, generator=generator) for _ in range(2)]
    shifts = [torch.randn(N_IMAGES, n_classes, generator=generator) for _ in range(2)]
    variants = (
        Outcome(embedding, logits),
        Outcome(embedding + 0.2 * noise[0], logits + 0.5 * shifts[0]),
        Outcome(noise[1], 3 * shifts[1]),
    )
    return variants, labels


def part(variants: Variants, rows: slice) -> Variants:
    found = [Outcome(each.embedding[rows], each.logits[rows]) for each in variants]
    return found[0], found[1], found[2]


def probabilities(row: list[float], independent: bool) -> list[list[float]]:
    """Distributions: one over the classes, or yes and no of each class."""
    if independent:
        yes = [1 / (1 + math.exp(-value)) for value in row]
        return [[p, 1 - p] for p in yes]
    total = sum(math.exp(value) for value in row)
    return [[math.exp(value) / total for value in row]]


def plain_kl(clean: list[float], other: list[float], independent: bool) -> float:
    both = zip(probabilities(clean, independent), probabilities(other, independent), strict=True)
    return sum(p * math.log(p / q) for ps, qs in both for p, q in zip(ps, qs, strict=True))


def plain_cross_entropy(row: list[float], label: int, independent: bool) -> float:
    found = probabilities(row, independent)
    if not independent:
        return -math.log(found[0][label])
    return -sum(math.log(p[0] if c == label else p[1]) for c, p in enumerate(found))


def plain_rank(row: list[float], label: int) -> int:
    return sum(value > row[label] for value in row)


@pytest.mark.parametrize("independent", [False, True])
def test_losses_against_plain_loops_in_uneven_batches(independent: bool):
    variants, labels = outcomes()
    metric = SpliceLoss(independent=independent)
    for rows in (slice(0, 10), slice(10, 11), slice(11, None)):
        metric.update(*part(variants, rows), labels[rows])
    found = metric.compute()
    assert found.n_images == N_IMAGES
    for number, variant in enumerate(variants):
        assert variant.logits is not None
        rows = variant.logits.double().tolist()
        clean = variants[0].logits.double().tolist()  # type: ignore[union-attr]
        kl = [plain_kl(a, b, independent) for a, b in zip(clean, rows, strict=True)]
        entropy = [
            plain_cross_entropy(row, label, independent)
            for row, label in zip(rows, labels.tolist(), strict=True)
        ]
        ranks = [plain_rank(row, label) for row, label in zip(rows, labels.tolist(), strict=True)]
        same = [row.index(max(row)) == c.index(max(c)) for row, c in zip(rows, clean, strict=True)]
        cosines = [
            float(a @ b / a.norm() / b.norm())
            for a, b in zip(variants[0].embedding.double(), variant.embedding.double(), strict=True)
        ]
        expected = {
            "similarity": cosines,
            "kl": kl,
            "agreement": same,
            "cross_entropy": entropy,
            "top1": [rank == 0 for rank in ranks],
            "top5": [rank < 5 for rank in ranks],
        }
        for name, values in expected.items():
            mean = sum(values) / N_IMAGES
            assert getattr(found, name)[number] == pytest.approx(mean, abs=1e-12), name


def test_recovered_counts_from_the_ablated_to_the_clean():
    assert Measure(0.9, 0.8, 0.1).recovered == pytest.approx(0.875)
    kl = Measure(0.0, 0.5, 2.0)
    assert kl.recovered == pytest.approx(1 - 0.5 / 2.0)
    assert math.isnan(Measure(0.3, 0.3, 0.3).recovered)


def test_what_is_not_given_is_not_made_up():
    (clean, spliced, ablated), labels = outcomes(n_classes=4)
    metric = SpliceLoss()
    metric.update(*(each._replace(logits=None) for each in (clean, spliced, ablated)))
    found = metric.compute()
    assert found.similarity.clean == pytest.approx(1)
    assert found[2:] == (None,) * 5
    metric.reset()
    metric.update(clean, spliced, ablated)
    assert metric.compute().kl is not None
    assert metric.compute().top1 is None
    metric.reset()
    metric.update(clean, spliced, ablated, labels)
    assert metric.compute().top1 is not None
    assert metric.compute().top5 is None


def test_no_image_and_no_number_are_errors():
    metric = SpliceLoss()
    with pytest.warns(UserWarning, match="before"), pytest.raises(DataError, match="no image"):
        metric.compute()
    (clean, spliced, ablated), _ = outcomes()
    spliced.embedding[3, 1] = torch.nan
    metric.update(clean, spliced, ablated)
    with pytest.raises(DataError, match="is nan or infinite"):
        metric.compute()


def codes() -> SparseCodes:
    """Latent 3 never fires; padding names latents all the same."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(4, 5, 6, generator=generator).relu()
    dense[..., 3] = 0
    values, indices = dense.topk(4, dim=-1)
    return SparseCodes(indices, values, 6)


def test_activity_against_a_dense_matrix():
    dense = codes().to_dense().reshape(-1, 6)
    metric = LatentActivity(n_latents=6)
    for rows in (torch.tensor([0]), torch.tensor([1, 2, 3])):
        metric.update(codes().select(rows))
    found = metric.compute()
    assert found.n_rows == 20
    for latent in range(6):
        active = [float(value) for value in dense[:, latent] if value > 0]
        assert found.firing_counts[latent] == len(active)
        if latent == 3:
            assert math.isnan(found.mean[latent])
            assert math.isnan(found.largest[latent])
        else:
            assert float(found.mean[latent]) == pytest.approx(sum(active) / len(active))
            assert float(found.largest[latent]) == max(active)


def test_histogram_against_a_plain_loop():
    assert len(EDGES) == 25
    assert (EDGES[0], EDGES[4], EDGES[-1]) == (1e-6, 1e-5, 1.0)
    n_rows = 10_000_000
    counts = [0, 0, 1, 5, 10, 17, 18, 100, 999_999, 1_000_000, 9_999_999, n_rows]
    expected = [0] * 24
    for count in counts:
        if count:
            place = 4 * (math.log10(count / n_rows) + 6)
            expected[min(max(math.floor(place + 1e-9), 0), 23)] += 1
    found = frequency_histogram(torch.tensor(counts), n_rows)
    assert found.counts == expected
    assert found.dead == 2
    assert found.dead + sum(found.counts) == len(counts)


# Two processes


def compute_on(rows: slice) -> list[Tensor]:
    variants, labels = outcomes()
    loss, activity = SpliceLoss(), LatentActivity(n_latents=6)
    if rows.stop != rows.start:
        loss.update(*part(variants, rows), labels[rows])
        activity.update(codes().select(torch.arange(4)[rows]))
    measures = [torch.tensor(each[:3]) for each in loss.compute()[1:] if each is not None]
    return [*measures, *(torch.as_tensor(each) for each in activity.compute())]


def run_process(rank: int, folder: str) -> None:
    """The first has three images and then all, the second the others and then none."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for number, middle in enumerate((3, N_IMAGES)):
        rows = slice(0, middle) if rank == 0 else slice(middle, N_IMAGES)
        torch.save(compute_on(rows), Path(folder) / f"{number}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    spawn(run_process, args=(str(tmp_path),), nprocs=2)
    expected = compute_on(slice(0, N_IMAGES))
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 4
    for file in files:
        for found, wanted in zip(torch.load(file), expected, strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True)

"""Monosemanticity and class spread, against loops over all pairs of images and over all images."""

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from clipattr.codes import SparseCodes, add_transposed
from clipattr.errors import DataError
from clipattr.metrics.class_spread import ClassSpread
from clipattr.metrics.monosemanticity import Monosemanticity

N_IMAGES, N_LATENTS, N_CLASSES, D_EMBED = 23, 7, 3, 5
EVERYWHERE, CONSTANT, SINGLE, DEAD = 3, 4, 5, 6


def draw(*, signed: bool = False) -> tuple[SparseCodes, torch.Tensor, torch.Tensor]:
    """Latents 0 to 2 fire now and then, 3 and 4 in every image, 5 in one, 6 never."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(N_IMAGES, N_LATENTS, generator=generator) + 0.1
    dense[:, :3] *= torch.rand(N_IMAGES, 3, generator=generator) < 0.4
    dense[:, CONSTANT], dense[:, DEAD] = 0.7, 0
    dense[torch.arange(N_IMAGES) != 8, SINGLE] = 0
    if signed:
        dense[::2] *= -1
        dense[:, CONSTANT] = -0.7
    indices = dense.abs().topk(6, dim=1).indices
    # A slot of padding names a latent that is never silent, and means nothing.
    indices = torch.nn.functional.pad(indices, (0, 1), value=EVERYWHERE)
    values = dense.gather(1, indices)
    values[:, 6] = 0
    codes = SparseCodes(indices, values, N_LATENTS)
    embeddings = torch.randn(N_IMAGES, D_EMBED, generator=generator) + 0.3
    embeddings *= torch.logspace(-2, 2, N_IMAGES)[:, None]
    labels = torch.randint(N_CLASSES, (N_IMAGES,), generator=generator)
    return codes, embeddings, labels


def ms_of_all_pairs(activations: torch.Tensor, embeddings: torch.Tensor) -> float:
    low, high = activations.min(), activations.max()
    scaled = ((activations - low) / (high - low)).tolist()
    above = below = 0.0
    for one, two in combinations(range(len(scaled)), 2):
        cosine = torch.cosine_similarity(embeddings[one], embeddings[two], dim=0).item()
        above += scaled[one] * scaled[two] * cosine
        below += scaled[one] * scaled[two]
    return above / below


@pytest.mark.parametrize("signed", [False, True])
def test_monosemanticity_is_the_weighted_mean_cosine_of_all_pairs(signed: bool):
    codes, embeddings, _ = draw(signed=signed)
    metric = Monosemanticity(n_latents=N_LATENTS, d_embed=D_EMBED)
    for rows in torch.arange(N_IMAGES).split(9):
        metric.update(codes.select(rows), embeddings[rows])
    found, dense = metric.compute(), codes.to_dense().double()
    fires = [0, 1, 2, EVERYWHERE] + ([SINGLE] if signed else [])
    for latent in fires:
        expected = ms_of_all_pairs(dense[:, latent], embeddings.double())
        assert found[latent].item() == pytest.approx(expected, abs=1e-9)
    assert found[[CONSTANT, DEAD]].isnan().all()


def test_monosemanticity_of_one_image_is_nothing_and_of_two_is_their_cosine():
    codes, embeddings, _ = draw()
    metric = Monosemanticity(n_latents=N_LATENTS, d_embed=D_EMBED)
    metric.update(codes, embeddings)
    assert metric.compute()[SINGLE].isnan()
    # The second image counts a millionth of the first, and its cosine is still exact.
    metric = Monosemanticity(n_latents=1, d_embed=D_EMBED)
    values = torch.tensor([[1.0], [1e-6], [0.0]])
    metric.update(SparseCodes(torch.zeros(3, 1).long(), values, 1), embeddings[:3])
    cosine = torch.cosine_similarity(embeddings[0].double(), embeddings[1].double(), dim=0)
    assert metric.compute().item() == pytest.approx(cosine.item(), abs=1e-8)


def test_monosemanticity_does_not_change_with_the_scale():
    codes, embeddings, _ = draw()
    found = []
    for scale in (1.0, 1000.0):
        metric = Monosemanticity(n_latents=N_LATENTS, d_embed=D_EMBED)
        metric.update(codes._replace(values=codes.values * scale), embeddings * 3)
        found.append(metric.compute())
    torch.testing.assert_close(found[0], found[1], equal_nan=True, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_embedding_without_direction_is_an_error(bad: float):
    codes, embeddings, _ = draw()
    embeddings[4] = bad
    metric = Monosemanticity(n_latents=N_LATENTS, d_embed=D_EMBED)
    with pytest.raises(DataError, match="1 of 23 embeddings"):
        metric.update(codes, embeddings)


def test_class_spread_equals_a_loop():
    codes, _, labels = draw(signed=True)
    metric = ClassSpread(n_latents=N_LATENTS, n_classes=N_CLASSES)
    for rows in torch.arange(N_IMAGES).split(9):
        metric.update(codes.select(rows), labels[rows])
    found, dense = metric.compute(), codes.to_dense()
    assert found.n_images.tolist() == [int((labels == c).sum()) for c in range(N_CLASSES)]
    for latent in range(DEAD):
        counts = [
            sum(1 for n in range(N_IMAGES) if labels[n] == c and dense[n, latent] != 0)
            for c in range(N_CLASSES)
        ]
        shares = [count / sum(counts) for count in counts]
        entropy = -sum(share * math.log(share) for share in shares if share) / math.log(3)
        assert found.counts[latent].tolist() == counts
        assert found.entropy[latent].item() == pytest.approx(entropy)
        assert found.top_class[latent].item() == counts.index(max(counts))
        assert found.top_share[latent].item() == pytest.approx(max(shares))
    assert found.entropy[SINGLE] == 0
    assert found.entropy[DEAD].isnan()
    assert found.top_class[DEAD] == -1


def test_a_class_that_does_not_exist_is_an_error():
    codes, _, labels = draw()
    labels[2] = -1
    metric = ClassSpread(n_latents=N_LATENTS, n_classes=N_CLASSES)
    with pytest.raises(DataError, match="1 of 23 labels .* outside of 0 to 2, for example -1"):
        metric.update(codes, labels)
    with pytest.raises(ValueError, match="n_classes=1"):
        ClassSpread(n_latents=2, n_classes=1)


def test_add_transposed_touches_only_the_latents_of_the_batch():
    codes, embeddings, _ = draw()
    codes = SparseCodes(codes.indices.clamp_max(5), codes.values, N_LATENTS)
    total = torch.full((N_LATENTS, D_EMBED), torch.nan, dtype=torch.float64)
    total[:6] = 1.0
    add_transposed(total, codes.values, codes.indices, embeddings)
    expected = 1 + codes.to_dense().T.double() @ embeddings.double()
    torch.testing.assert_close(total[:6], expected[:6], atol=1e-4, rtol=1e-5)
    assert total[6].isnan().all()


def results_on(rows: torch.Tensor) -> list[torch.Tensor]:
    codes, embeddings, labels = draw(signed=True)
    meaning = Monosemanticity(n_latents=N_LATENTS, d_embed=D_EMBED)
    spread = ClassSpread(n_latents=N_LATENTS, n_classes=N_CLASSES)
    if len(rows):
        meaning.update(codes.select(rows), embeddings[rows])
        spread.update(codes.select(rows), labels[rows])
    counts, n_images, entropy, *_ = spread.compute()
    return [meaning.compute(), counts.long(), n_images, entropy]


def test_states_of_two_processes_merge_into_one():
    codes, embeddings, labels = draw(signed=True)
    parts = []
    for rows in (torch.arange(14), torch.arange(14, N_IMAGES)):
        meaning = Monosemanticity(n_latents=N_LATENTS, d_embed=D_EMBED)
        spread = ClassSpread(n_latents=N_LATENTS, n_classes=N_CLASSES)
        meaning.update(codes.select(rows), embeddings[rows])
        spread.update(codes.select(rows), labels[rows])
        parts.append((meaning, spread))
    for one, two in zip(*parts, strict=True):
        one.merge_state(two)
    expected = results_on(torch.arange(N_IMAGES))
    torch.testing.assert_close(parts[0][0].compute(), expected[0], equal_nan=True)
    torch.testing.assert_close(parts[0][1].compute().entropy, expected[3], equal_nan=True)


def run_process(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.save(results_on(torch.arange(rank, N_IMAGES, 2)), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    spawn(run_process, args=(str(tmp_path),), nprocs=2)
    expected = results_on(torch.arange(N_IMAGES))
    for rank in range(2):
        for found, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True)

"""BatchTopK: the packing of ragged rows, and the threshold that replaces the batch."""

import pytest
import torch

from clipattr.codes import pack
from clipattr.sae import BatchTopKSae, MatryoshkaSae
from clipattr.sae.topk import THRESHOLD_RATE
from tests.saes import N_LATENTS, SIZES, K, normal, seeded, small_rows, small_sae


def test_pack_keeps_every_pair_and_nothing_else():
    pairs = [(0, 4), (2, 0), (2, 1), (2, 5), (3, 5)]
    flat = torch.tensor([row * 6 + latent for row, latent in pairs])
    indices, is_chosen = pack(flat, n_rows=5, n_latents=6)
    assert indices.shape == (5, 3)
    found = [
        (row, indices[row, slot].item()) for row in range(5) for slot in range(3)
        if is_chosen[row, slot]
    ]  # fmt: skip
    assert found == pairs
    assert ((indices >= 0) & (indices < 6)).all()


def test_pack_of_nothing():
    indices, is_chosen = pack(torch.zeros(0, dtype=torch.int64), n_rows=3, n_latents=6)
    assert indices.shape == (3, 1)
    assert not is_chosen.any()


def test_padding_names_no_latent_more_than_its_share():
    flat = torch.arange(50)  # one row has all, 99 rows are padding alone
    indices, is_chosen = pack(flat, n_rows=100, n_latents=50)
    counts = torch.bincount(indices[~is_chosen], minlength=50)
    assert counts.max() - counts.min() <= 1


def test_a_batch_has_k_per_row_on_average():
    sae = small_sae("batch_topk").train()
    x = small_rows()
    x[0] = sae.b_dec.detach() + 20 * (x[0] - sae.b_dec.detach())
    counts = sae.encode(x).is_active.sum(1)
    assert counts.sum() == K * len(x)
    assert counts[0] > K > counts.min()


def test_inference_does_not_depend_on_neighbours():
    sae = small_sae("batch_topk").eval()
    x = small_rows()
    together = sae(x)
    for row in range(len(x)):
        alone = sae(x[row : row + 1])
        torch.testing.assert_close(alone.recon[0], together.recon[row], rtol=1e-12, atol=1e-12)
        assert torch.equal(alone.codes.to_dense()[0] > 0, together.codes.to_dense()[row] > 0)


def test_the_threshold_follows_the_smallest_chosen_activation():
    sae = BatchTopKSae(**SIZES, k=K, generator=seeded()).double()
    sae.initialise_from(small_rows())
    expected = 0.0
    for step in range(5):
        x = small_rows() + normal(20, 6, seed=step)
        output = sae(x)
        kept = sorted(output.pre.flatten().tolist())[-K * 20 :]
        smallest = min(value for value in kept if value > 0)
        expected = smallest if step == 0 else expected + THRESHOLD_RATE * (smallest - expected)
        (moved,) = sae.update_statistics(output)
        assert moved is sae.threshold
        assert sae.threshold.item() == pytest.approx(expected, rel=1e-12)


def test_a_batch_without_an_activation_leaves_the_threshold():
    sae = small_sae("batch_topk")
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    sae.update_statistics(sae(small_rows()))
    assert sae.threshold.item() == 0.8


@pytest.mark.parametrize("kind", [BatchTopKSae, MatryoshkaSae])
def test_inference_has_the_l0_of_training(kind: type[BatchTopKSae]):
    sae = kind(d_model=24, n_latents=192, k=12, generator=seeded()).double()
    atoms = torch.nn.functional.normalize(normal(64, 24, seed=1), dim=1)

    def draw(n_rows: int, seed: int) -> torch.Tensor:
        generator = seeded(seed)
        amplitudes = torch.rand(n_rows, 64, generator=generator, dtype=torch.float64)
        is_active = torch.rand(n_rows, 64, generator=generator) < 0.1
        return 9 + 4 * (amplitudes * is_active) @ atoms

    sae.initialise_from(draw(1000, seed=2))
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, 600)
    for step in range(600):
        x = draw(128, seed=10 + step)
        output = sae(x)
        loss = (x - output.recon).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        sae.update_statistics(output)
    held_out = sae.eval().encode(draw(4000, seed=5))
    l0 = held_out.is_active.sum(1).double()
    assert l0.mean().item() == pytest.approx(12, rel=0.05)
    assert l0.std() > 1  # rows differ, unlike in TopK


def test_matryoshka_over_rows_has_no_threshold():
    sae = small_sae("matryoshka_rows")
    assert sae.update_statistics(sae(small_rows())) == ()
    assert sae.max_active == K
    assert small_sae("matryoshka").max_active == N_LATENTS
    assert torch.equal(
        sae.train().encode(small_rows()).values, sae.eval().encode(small_rows()).values
    )

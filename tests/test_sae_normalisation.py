"""Normalisations, where training starts from, and folding into the weights."""

import pytest
import torch

from clipattr.errors import DataError
from clipattr.sae import BatchTopKSae, TopKSae, Transcoder
from clipattr.sae.initial import DATA_SHARE, Bias, geometric_median, point_at
from clipattr.sae.normalisation import Normalisation
from tests.saes import (
    ALL,
    BUILDERS,
    D_MODEL,
    N_LATENTS,
    SIZES,
    initialise,
    normal,
    seeded,
    small_rows,
    small_sae,
    small_targets,
)

LINEAR = [each for each in Normalisation if each is not Normalisation.layer_norm]


def fresh(normalisation: Normalisation, **options: object) -> TopKSae:
    sae = TopKSae(**SIZES, k=3, normalisation=normalisation, generator=seeded()).double()
    sae.initialise_from(small_rows(), **options)
    return sae


def test_statistics_of_the_inputs():
    x = small_rows()
    seen = {each: fresh(each).normalise(x) for each in Normalisation}
    assert torch.equal(seen[Normalisation.none][0], x)
    assert seen[Normalisation.centre][0].mean(0).abs().max() < 1e-12
    u, unit = seen[Normalisation.norm]
    assert u.norm(dim=1).mean().item() == pytest.approx(1)
    torch.testing.assert_close(u * unit, x)
    u, unit = seen[Normalisation.layer_norm]
    torch.testing.assert_close(u, torch.nn.functional.layer_norm(x, (D_MODEL,), eps=0))
    torch.testing.assert_close(unit[:, 0], x.std(1, correction=0))
    u, unit = seen[Normalisation.standardise]
    torch.testing.assert_close(u, (x - x.mean(0)) / x.std(0, correction=0))
    assert unit.item() == pytest.approx(x.var(0, correction=0).mean().sqrt().item())
    u, _ = seen[Normalisation.scale]
    assert u.mean(0).abs().max() < 1e-12
    assert u.square().mean().item() == pytest.approx(1)


@pytest.mark.parametrize("normalisation", LINEAR)
def test_every_linear_normalisation_starts_centred_and_tied(normalisation: Normalisation):
    # z_j = v_j . (x - mean) in the units of s, whatever has been taken out of x before.
    sae, x = fresh(normalisation), small_rows()
    u, unit = sae.normalise(x)
    z = u @ sae.W_enc.T + sae.b_enc
    spread = sae.input_spread if normalisation is Normalisation.standardise else 1.0
    torch.testing.assert_close(z, (x - x.mean(0)) / (unit * spread) @ sae.W_dec.T)


def test_constant_dimensions_and_rows_are_finite():
    x = small_rows()
    x[:, 2] = 4.0
    sae = TopKSae(**SIZES, k=3, normalisation=Normalisation.standardise).double()
    sae.initialise_from(x)
    assert sae(x).recon.isfinite().all()
    sae = TopKSae(**SIZES, k=3, normalisation=Normalisation.layer_norm).double()
    constant = torch.full((2, D_MODEL), 3.0, dtype=torch.float64)
    assert sae(constant).recon.isfinite().all()


@pytest.mark.parametrize("normalisation", list(Normalisation))
def test_rows_without_spread_are_refused(normalisation: Normalisation):
    sae = TopKSae(**SIZES, k=3, normalisation=normalisation)
    for rows, message in ((torch.ones(4, D_MODEL), "is 0"), (torch.full((4, 6), torch.nan), "nan")):
        with pytest.raises(DataError, match=message):
            sae.initialise_from(rows)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("normalisation", LINEAR)
@pytest.mark.parametrize("training", [True, False])
def test_a_folded_sae_is_equal(name: str, normalisation: Normalisation, training: bool):
    sae = small_sae(name, normalisation).train(training)
    before = torch.get_rng_state()
    folded, x = sae.fold(), small_rows()
    assert torch.equal(before, torch.get_rng_state())
    assert folded.normalisation is Normalisation.none
    ours, theirs = folded(x), sae(x)
    torch.testing.assert_close(ours.recon, theirs.recon, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        ours.codes.to_dense(), theirs.codes.to_dense(), rtol=1e-11, atol=1e-11
    )
    assert torch.equal(folded.W_dec, sae.directions)
    if not isinstance(sae, Transcoder):
        # The plainest of all: codes times directions.
        recon = theirs.codes.to_dense() @ folded.W_dec + folded.b_dec
        torch.testing.assert_close(recon, theirs.recon, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_a_layer_norm_stays_and_says_so(name: str):
    sae = small_sae(name, Normalisation.layer_norm)
    folded = sae.fold()
    assert folded.normalisation is Normalisation.layer_norm
    assert torch.equal(folded(small_rows()).recon, sae(small_rows()).recon)
    with torch.no_grad():
        folded.b_dec.add_(1)
    assert not torch.equal(folded.b_dec, sae.b_dec)


def test_folding_moves_the_threshold_into_raw_units():
    sae = small_sae("batch_topk")
    folded = sae.fold()
    assert isinstance(sae, BatchTopKSae)
    assert isinstance(folded, BatchTopKSae)
    torch.testing.assert_close(folded.threshold, sae.threshold * sae.input_scale)


def test_geometric_median_is_the_minimum():
    rows = small_rows()
    rows[0] += 1e4
    found = geometric_median(rows).requires_grad_()
    # The sum of distances is convex: where it is flat, it is least.
    (slope,) = torch.autograd.grad((rows - found).norm(dim=1).sum(), found)
    assert slope.norm() < 1e-6
    centre = small_rows().mean(0)
    assert (found.detach() - centre).norm() < 2 < 1000 < (rows.mean(0) - centre).norm()


def test_geometric_median_of_known_points():
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(square + 7), torch.full((2,), 7.0).double())
    # The mean, where the iteration starts, is one of the rows.
    torch.testing.assert_close(
        geometric_median(torch.cat([square, torch.zeros(1, 2)])), torch.zeros(2).double()
    )
    # It is one of the rows, but another.
    line = torch.tensor([[0.0], [1], [1], [1], [-3]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(line), torch.ones(1).double())
    equal = torch.ones(3, 2, dtype=torch.float64)
    torch.testing.assert_close(geometric_median(equal), equal[0])


@pytest.mark.parametrize("name", ["topk", "transcoder"])
def test_the_bias_can_be_the_geometric_median(name: str):
    sae = BUILDERS[name](generator=seeded()).double()
    initialise(sae, bias=Bias.geometric_median)
    target = small_targets() if name == "transcoder" else small_rows()
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(target))
    assert not torch.equal(sae.b_dec, target.mean(0))


@pytest.mark.parametrize("normalisation", list(Normalisation))
def test_latents_can_start_at_the_data(normalisation: Normalisation):
    sae, plain = fresh(normalisation, from_data=True), fresh(normalisation)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_LATENTS).double())
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    u, _ = sae.normalise(small_rows())
    rows = torch.nn.functional.normalize(u - u.mean(0), dim=1)[:N_LATENTS]
    cosine, chance = ((rows * each.W_dec).sum(1) for each in (sae, plain))
    assert cosine.min() > 0.9 > chance.mean() + 0.5


def test_latents_that_share_a_row_differ():
    directions = torch.nn.functional.normalize(normal(9, 4, seed=0), dim=1)
    rows = normal(2, 4, seed=1)
    found = point_at(rows, directions)
    for latent in range(9):
        row = rows[latent % 2] / rows[latent % 2].norm()
        blend = (1 - DATA_SHARE) * directions[latent] + DATA_SHARE * row
        torch.testing.assert_close(found[latent], blend / blend.norm())
    assert len(found.unique(dim=0)) == 9


def test_a_transcoder_starts_from_pairs():
    sae = Transcoder(**SIZES, d_out=5, k=3, generator=seeded()).double()
    x, y = small_rows(), small_targets()
    with pytest.raises(DataError, match="20 rows of the input site and none"):
        sae.initialise_from(x)
    with pytest.raises(DataError, match="and 3 of the output site"):
        sae.initialise_from(x, y[:3])
    sae.initialise_from(x, y, from_data=True)
    torch.testing.assert_close(sae.b_dec.detach(), y.mean(0))
    torch.testing.assert_close(sae.input_mean, x.mean(0))
    assert sae.output_scale.item() == pytest.approx(y.var(0, correction=0).mean().sqrt().item())
    wanted = torch.nn.functional.normalize(y - y.mean(0), dim=1)[:N_LATENTS]
    assert (wanted * sae.W_dec).sum(1).min() > 0.9

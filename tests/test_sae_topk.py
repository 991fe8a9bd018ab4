import copy

import pytest
import torch
from torch.nn import functional

from clipattr.errors import ConfigError, DataError
from clipattr.sae.constraints import normalise_decoder_, remove_parallel_gradient_
from clipattr.sae.dead import FiringHistory
from clipattr.sae.losses import auxk_loss
from clipattr.sae.relative import relative_error, spread_of
from clipattr.sae.topk import TopKSae

D_MODEL, N_LATENTS, K = 6, 12, 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_sae() -> tuple[TopKSae, torch.Tensor]:
    """A float64 SAE whose parameters are all non-trivial, and rows far from zero mean."""
    sae = TopKSae(d_model=D_MODEL, n_latents=N_LATENTS, k=K, generator=seeded()).double()
    x = 5 + 3 * torch.randn(20, D_MODEL, generator=seeded(1), dtype=torch.float64)
    sae.initialise_from(x)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(N_LATENTS, generator=seeded(2)))
        sae.W_enc.add_(0.3 * torch.randn(sae.W_enc.shape, generator=seeded(3)))
    return sae, x


def plain_forward(sae: TopKSae, row: torch.Tensor) -> tuple[dict[int, float], torch.Tensor]:
    """Latents and reconstruction of one row, in plain Python on the documented equations."""
    scale = sae.input_scale.item()
    pre = [
        sum((row[i] - sae.b_dec[i]).item() / scale * sae.W_enc[j, i].item() for i in range(D_MODEL))
        + sae.b_enc[j].item()
        for j in range(N_LATENTS)
    ]
    chosen = sorted(range(N_LATENTS), key=lambda j: -pre[j])[:K]
    active = {j: scale * pre[j] for j in chosen if pre[j] > 0}
    recon = sae.b_dec.detach().clone()
    for j, value in active.items():
        recon += value * sae.W_dec[j].detach()
    return active, recon


def test_forward_equals_plain_loop():
    sae, x = small_sae()
    output = sae(x)
    dense = output.codes.to_dense()
    for row in range(len(x)):
        active, recon = plain_forward(sae, x[row])
        assert set(dense[row].nonzero().flatten().tolist()) == set(active)
        for latent, value in active.items():
            assert dense[row, latent].item() == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(output.recon[row], recon, rtol=0, atol=1e-12)


def test_token_axis_and_encode_agree_with_forward():
    sae, x = small_sae()
    tokens = x.reshape(4, 5, D_MODEL)
    assert torch.equal(sae.encode(tokens).values.reshape(20, K), sae(x).codes.values)
    assert torch.equal(sae.decode(sae.encode(tokens)).reshape(20, D_MODEL), sae(x).recon)


def test_codes_are_in_raw_units():
    # Ten times the activation: the same latents, each ten times as active.
    sae, x = small_sae()
    other = copy.deepcopy(sae)
    sae.initialise_from(x)
    codes = sae.encode(x)
    other.initialise_from(10 * x)
    scaled = other.encode(10 * x)
    assert torch.equal(codes.indices, scaled.indices)
    torch.testing.assert_close(scaled.values, 10 * codes.values)


def test_forward_changes_no_state():
    sae, x = small_sae()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.train()(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())


def test_initialisation():
    sae, x = small_sae()
    torch.testing.assert_close(sae.b_dec, x.mean(0))
    normalised = (x - sae.b_dec) / sae.input_scale
    assert normalised.square().mean().item() == pytest.approx(1.0)
    fresh = TopKSae(d_model=D_MODEL, n_latents=N_LATENTS, k=K, generator=seeded())
    assert torch.equal(fresh.W_enc, fresh.W_dec)
    assert fresh.W_enc.data_ptr() != fresh.W_dec.data_ptr()
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(N_LATENTS))
    with pytest.raises(DataError, match="scale of 4 activation rows is 0"):
        fresh.initialise_from(torch.ones(4, D_MODEL))


@pytest.mark.parametrize(("n_latents", "k"), [(4, 5), (4, 0), (0, 0)])
def test_impossible_sizes(n_latents: int, k: int):
    with pytest.raises(ConfigError, match=f"k={k}"):
        TopKSae(d_model=3, n_latents=n_latents, k=k)


def test_relative_error():
    x = torch.randn(30, 4, generator=seeded(), dtype=torch.float64) + 7
    recon = x + torch.randn(30, 4, generator=seeded(1), dtype=torch.float64)
    error = sum((x[i, d] - recon[i, d]).item() ** 2 for i in range(30) for d in range(4))
    spread = sum((x[i, d] - x[:, d].mean()).item() ** 2 for i in range(30) for d in range(4))
    assert relative_error(x, recon, spread_of(x)).item() == pytest.approx(error / spread, rel=1e-12)
    assert relative_error(x, x.mean(0).expand_as(x), spread_of(x)).item() == pytest.approx(1.0)
    assert relative_error(x, x, spread_of(x)).item() == 0


def test_auxk_loss_equals_plain_loop():
    sae, x = small_sae()
    output = sae(x)
    dead, k_aux = [1, 4, 5, 9], 2
    is_dead = torch.zeros(N_LATENTS, dtype=torch.bool)
    is_dead[dead] = True
    residual = (x - output.recon).detach()
    error = 0.0
    for row in range(len(x)):
        chosen = sorted(dead, key=lambda j: -output.pre[row, j].item())[:k_aux]
        estimate = sum(
            max(output.pre[row, j].item(), 0.0) * sae.input_scale * sae.W_dec[j] for j in chosen
        )
        error += (residual[row] - estimate).square().sum().item()
    expected = error / (residual - residual.mean(0)).square().sum().item()
    assert auxk_loss(sae, x, output, is_dead, k_aux).item() == pytest.approx(expected, rel=1e-12)


def test_auxk_gradient_reaches_dead_latents_only():
    sae, x = small_sae()
    output = sae(x)
    is_dead = torch.arange(N_LATENTS) < 4
    output.recon.retain_grad()
    auxk_loss(sae, x, output, is_dead, k_aux=4).backward()
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        size = parameter.grad.abs().reshape(N_LATENTS, -1).sum(1)
        assert (size[:4] > 0).all()
        assert (size[4:] == 0).all()
    assert output.recon.grad is None


def test_auxk_without_dead_latents_is_zero_and_differentiable():
    sae, x = small_sae()
    loss = auxk_loss(sae, x, sae(x), torch.zeros(N_LATENTS, dtype=torch.bool), k_aux=4)
    assert loss.item() == 0
    loss.backward()


def test_firing_history_equals_plain_loop():
    sae, x = small_sae()
    history = FiringHistory(N_LATENTS)
    silent = [0] * N_LATENTS
    for start in range(0, 20, 4):
        codes = sae.encode(x[start : start + 4])
        history.update(codes, n_rows=8)  # as if a second process had seen four more rows
        fired = set(codes.indices[codes.values > 0].tolist())
        silent = [0 if j in fired else n + 8 for j, n in enumerate(silent)]
    assert history.rows_since_fired.tolist() == silent
    assert history.is_dead(16).tolist() == [n >= 16 for n in silent]
    assert 0 < sum(n >= 16 for n in silent) < N_LATENTS


def test_padding_is_not_a_firing():
    sae, x = small_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    history = FiringHistory(N_LATENTS)
    history.update(sae.encode(x), n_rows=len(x))
    assert (history.rows_since_fired == len(x)).all()


def test_constraints():
    sae, x = small_sae()
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(N_LATENTS, 1, generator=seeded()) + 0.5)
    relative_error(x, sae(x).recon, spread_of(x)).backward()
    before = sae.W_dec.grad.clone()
    remove_parallel_gradient_(sae.W_dec)
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12
    # Only the parallel part went: what was taken away lies along v_j.
    removed = before - sae.W_dec.grad
    assert removed.norm() > 1e-3
    along = (removed * functional.normalize(sae.W_dec.detach(), dim=1)).sum(1)
    torch.testing.assert_close(along.abs(), removed.norm(dim=1))
    directions = functional.normalize(sae.W_dec.detach(), dim=1)
    normalise_decoder_(sae.W_dec)
    torch.testing.assert_close(sae.W_dec.detach(), directions)
    assert sae.W_dec.requires_grad

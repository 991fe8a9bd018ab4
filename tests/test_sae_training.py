"""Sanity of the science: a planted dictionary is found, and killed latents come back."""

import pytest
import torch
from torch.nn import functional

from clipattr.sae.constraints import normalise_decoder_, remove_parallel_gradient_
from clipattr.sae.dead import FiringHistory
from clipattr.sae.losses import auxk_loss, reconstruction_loss
from clipattr.sae.topk import TopKSae

D_MODEL, N_ATOMS, N_ACTIVE = 32, 64, 3
SCALE, OFFSET = 20.0, 100.0


def planted_rows(atoms: torch.Tensor, n_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Sums of a few atoms with amplitudes in [1, 2], in units and with a mean far from standard."""
    active = torch.rand(n_rows, N_ATOMS, generator=generator).topk(N_ACTIVE, dim=1).indices
    amplitudes = torch.zeros(n_rows, N_ATOMS).scatter_(
        1, active, 1 + torch.rand(n_rows, N_ACTIVE, generator=generator)
    )
    return SCALE * (amplitudes @ atoms) + OFFSET


def train(
    sae: TopKSae, atoms: torch.Tensor, *, steps: int, dead_after: int, k_aux: int, aux: float
) -> FiringHistory:
    """The training step as the LightningModule has it, on fresh rows."""
    generator = torch.Generator().manual_seed(1)
    history = FiringHistory(sae.n_latents)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    for _ in range(steps):
        x = planted_rows(atoms, 256, generator)
        output = sae(x)
        history.update(output.codes, len(x))
        loss = reconstruction_loss(x, output.recon)
        loss = loss + aux * auxk_loss(sae, x, output, history.is_dead(dead_after), k_aux)
        optimiser.zero_grad()
        loss.backward()
        remove_parallel_gradient_(sae.W_dec)
        optimiser.step()
        schedule.step()
        normalise_decoder_(sae.W_dec)
    return history


@pytest.fixture
def atoms() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return functional.normalize(torch.randn(N_ATOMS, D_MODEL, generator=generator), dim=1)


def planted_sae(atoms: torch.Tensor, n_latents: int) -> TopKSae:
    generator = torch.Generator().manual_seed(2)
    sae = TopKSae(d_model=D_MODEL, n_latents=n_latents, k=N_ACTIVE, generator=generator)
    sae.initialise_from(planted_rows(atoms, 4096, generator))
    return sae


def test_planted_dictionary_is_recovered(atoms: torch.Tensor):
    sae = planted_sae(atoms, n_latents=2 * N_ATOMS)
    train(sae, atoms, steps=1500, dead_after=5000, k_aux=16, aux=1 / 32)
    best_cosine = (atoms @ sae.W_dec.detach().T).max(1).values
    assert (best_cosine >= 0.95).double().mean() >= 0.95
    x = planted_rows(atoms, 2048, torch.Generator().manual_seed(3))
    assert reconstruction_loss(x, sae(x).recon) < 0.1


@pytest.mark.parametrize(("aux", "is_revived"), [(1 / 32, True), (0.0, False)])
def test_auxk_revives_killed_latents(atoms: torch.Tensor, aux: float, is_revived: bool):
    sae = planted_sae(atoms, n_latents=N_ATOMS)
    killed = torch.arange(N_ATOMS) < 16
    with torch.no_grad():
        sae.W_enc[killed] *= 0.05  # far too weak for the top k, whatever the row
    x = planted_rows(atoms, 2048, torch.Generator().manual_seed(3))
    assert not killed[sae.encode(x).indices].any()
    train(sae, atoms, steps=400, dead_after=1024, k_aux=16, aux=aux)
    codes = sae.encode(x)
    fired = torch.zeros(N_ATOMS, dtype=torch.bool)
    fired[codes.indices[codes.is_active]] = True
    assert (fired[killed].double().mean() > 0.9).item() == is_revived

"""Sanity of the science: a planted dictionary is found, and killed latents come back."""

import pytest
import torch
from torch.nn import functional

from clipattr.sae import BatchTopKSae, MatryoshkaSae, NestedTopKSae, TopKSae
from clipattr.sae.constraints import normalise_decoder_, remove_parallel_gradient_
from clipattr.sae.dead import FiringHistory
from clipattr.sae.losses import sae_loss
from clipattr.sae.relative import relative_error, spread_of
from clipattr.sae.sae import Sae

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
    sae: Sae, atoms: torch.Tensor, *, steps: int, dead_after: int, k_aux: int, aux: float
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
        loss = sae_loss(
            sae,
            x,
            output,
            is_dead=history.is_dead(dead_after),
            k_aux=k_aux,
            aux_coefficient=aux,
        )
        sae.update_statistics(output)
        optimiser.zero_grad()
        loss.total.backward()
        remove_parallel_gradient_(sae.W_dec)
        optimiser.step()
        schedule.step()
        normalise_decoder_(sae.W_dec)
    return history


@pytest.fixture
def atoms() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return functional.normalize(torch.randn(N_ATOMS, D_MODEL, generator=generator), dim=1)


def planted_sae(
    atoms: torch.Tensor, n_latents: int, kind: type[Sae] = TopKSae, **settings: object
) -> Sae:
    # Another seed than that of the atoms: none is known at the start.
    generator = torch.Generator().manual_seed(2)
    sae = kind(d_model=D_MODEL, n_latents=n_latents, generator=generator, **settings)
    assert (atoms @ sae.W_dec.detach().T).max() < 0.9
    sae.initialise_from(planted_rows(atoms, 4096, generator))
    return sae


def best_cosines(atoms: torch.Tensor, sae: Sae) -> torch.Tensor:
    return (atoms @ sae.W_dec.detach().T).max(1).values


def test_planted_dictionary_is_recovered(atoms: torch.Tensor):
    sae = planted_sae(atoms, 2 * N_ATOMS, k=N_ACTIVE)
    train(sae, atoms, steps=800, dead_after=5000, k_aux=16, aux=1 / 32)
    assert (best_cosines(atoms, sae) >= 0.95).double().mean() >= 0.95
    x = planted_rows(atoms, 2048, torch.Generator().manual_seed(3))
    assert relative_error(x, sae.eval()(x).recon, spread_of(x)) < 0.1


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (TopKSae, {"k": N_ACTIVE}),
        (BatchTopKSae, {"k": N_ACTIVE}),
        (MatryoshkaSae, {"k": N_ACTIVE}),
        (NestedTopKSae, {"ks": (2, N_ACTIVE)}),
    ],
)
def test_auxk_revives_killed_latents(
    atoms: torch.Tensor, kind: type[Sae], settings: dict[str, object]
):
    assert revived(atoms, kind, settings, aux=1 / 32) > 0.75


def test_without_auxk_killed_latents_stay_dead(atoms: torch.Tensor):
    assert revived(atoms, TopKSae, {"k": N_ACTIVE}, aux=0.0) == 0


def revived(atoms: torch.Tensor, kind: type[Sae], settings: dict[str, object], aux: float) -> float:
    """Share of the latents that were killed and fire again."""
    sae = planted_sae(atoms, N_ATOMS, kind, **settings)
    killed = torch.arange(N_ATOMS) < 16
    with torch.no_grad():
        sae.W_enc[killed] *= 0.05  # far too weak to be chosen, whatever the row
    x = planted_rows(atoms, 2048, torch.Generator().manual_seed(3))
    codes = sae.encode(x)
    assert not killed[codes.indices[codes.is_active]].any()
    train(sae, atoms, steps=400, dead_after=1024, k_aux=16, aux=aux)
    codes = sae.encode(x)
    fired = torch.zeros(N_ATOMS, dtype=torch.bool)
    fired[codes.indices[codes.is_active]] = True
    return fired[killed].double().mean().item()

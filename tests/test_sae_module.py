"""Every architecture in the Lightning module: it learns, resumes, and ranks agree."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from clipattr.sae import (
    BatchTopKSae,
    GatedSae,
    JumpReluSae,
    MatryoshkaSae,
    NestedTopKSae,
    ReluSae,
)
from clipattr.sae.sae import Sae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.sae_member import SaeMember
from clipattr.training.sae_module import SaeModule
from clipattr.training.trainer import build_trainer, fit
from tests.stores import store_of
from tests.test_training import N_STEPS, OF_SAE, KillAt, KilledError, activations, settings

KINDS = {
    BatchTopKSae: {"k": 3},
    MatryoshkaSae: {"k": 3, "fractions": (0.25, 0.75)},
    NestedTopKSae: {"ks": (2, 3)},
    ReluSae: {"sparsity": 1e-3},
    JumpReluSae: {"sparsity": 1e-3},
    GatedSae: {"sparsity": 1e-3},
}


def build(kind: type[Sae]) -> Sae:
    generator = torch.Generator().manual_seed(1)
    return kind(d_model=8, n_latents=24, generator=generator, **KINDS[kind])


def member_of(sae: Sae) -> SaeMember:
    return SaeMember(sae, lr=1e-2, warmup=3, k_aux=4, aux_coefficient=0.1, dead_after=64)


def run(kind: type[Sae], folder: Path, kill_at: int | None = None) -> dict[str, Tensor]:
    data = ActivationDataModule(
        lambda _: store_of(activations(), folder / "store"), batch_size=32, seed=0, n_steps=N_STEPS
    )
    module = SaeModule({"": member_of(build(kind))}, n_steps=N_STEPS)
    callbacks = [] if kill_at is None else [KillAt(kill_at)]
    fit(build_trainer(settings(), folder, callbacks=callbacks), module, data, folder)
    return module.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_learns(kind: type[Sae], tmp_path: Path):
    state = run(kind, tmp_path)
    rows, sae = activations(), build(kind)
    sae.initialise_from(rows)
    before = (rows - sae(rows).recon).square().sum()
    sae.load_state_dict({k[len(OF_SAE) :]: v for k, v in state.items() if OF_SAE in k})
    assert (rows - sae(rows).recon).square().sum() < 0.8 * before
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    if kind is BatchTopKSae:
        assert sae.threshold > 0


def test_the_threshold_resumes_with_the_same_bits(tmp_path: Path):
    whole = run(BatchTopKSae, tmp_path / "whole")
    with pytest.raises(KilledError):
        run(BatchTopKSae, tmp_path / "killed", kill_at=13)
    resumed = run(BatchTopKSae, tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def step_of_rank(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    member = member_of(build(BatchTopKSae))
    for rows in activations().chunk(4):
        member.take_in(member.sae(rows.chunk(2)[rank]), world_size=2)
    torch.save(member.sae.threshold, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_one_threshold(tmp_path: Path):
    spawn(step_of_rank, args=(str(tmp_path),), nprocs=2)
    alone = [build(BatchTopKSae) for _ in range(2)]
    for rows in activations().chunk(4):
        for sae, part in zip(alone, rows.chunk(2), strict=True):
            sae.update_statistics(sae(part))
        mean = torch.stack([sae.threshold for sae in alone]).mean()
        for sae in alone:
            sae.threshold.copy_(mean)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), mean)

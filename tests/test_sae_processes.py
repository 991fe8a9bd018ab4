"""Processes that have a part of the batch each minimise the loss of the whole batch."""

from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from clipattr.sae.losses import sae_loss
from clipattr.sae.normalisation import Normalisation
from clipattr.sae.relative import Average, alone
from tests.saes import ALL, N_LATENTS, small_rows, small_sae, target_of

N_RANKS = 2
# These choose over the rows of their own process in training: another choice, not a rounding.
OVER_BATCH = {"batch_topk", "matryoshka"}
CASES = [
    (name, normalisation)
    for name in ALL
    if name not in OVER_BATCH
    for normalisation in (Normalisation.scale, Normalisation.standardise, Normalisation.layer_norm)
]
IS_DEAD = torch.arange(N_LATENTS) % 2 == 0


def gradients(rank: int | None, average: Average) -> list[dict[str, Tensor]]:
    """Of the loss of the rows of a rank, or of all."""
    found = []
    for name, normalisation in CASES:
        sae = small_sae(name, normalisation).train()
        x, target = small_rows(), target_of(sae)
        if rank is not None:
            x, target = x.chunk(N_RANKS)[rank], target.chunk(N_RANKS)[rank]
        loss = sae_loss(
            sae, target, sae(x), is_dead=IS_DEAD, k_aux=3, aux_coefficient=0.5, average=average
        )
        loss.total.backward()
        found.append({"loss": loss.total.detach()} | dict(sae.named_parameters()))
    return [
        {name: value if name == "loss" else value.grad for name, value in one.items()}
        for one in found
    ]


def over_ranks(value: Tensor) -> Tensor:
    total = value.clone()
    distributed.all_reduce(total)
    return total / N_RANKS


def run_rank(rank: int, folder: str) -> None:
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=N_RANKS)
    torch.save(gradients(rank, over_ranks), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_the_mean_of_their_gradients_is_that_of_the_whole_batch(tmp_path: Path):
    spawn(run_rank, args=(str(tmp_path),), nprocs=N_RANKS)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(N_RANKS)]
    whole = gradients(None, alone)
    for case, expected, first, second in zip(CASES, whole, *parts, strict=True):
        for name, value in expected.items():
            mean = (first[name] + second[name]) / N_RANKS
            torch.testing.assert_close(mean, value, rtol=1e-12, atol=1e-12, msg=f"{case}, {name}")
    # Without the average of the spread it is not, so the above can fail.
    wrong = [gradients(rank, alone)[0]["W_dec"] for rank in range(N_RANKS)]
    assert ((wrong[0] + wrong[1]) / N_RANKS - whole[0]["W_dec"]).abs().max() > 1e-3

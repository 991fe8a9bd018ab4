"""Two real processes that divide the images find the examples that sorted dense codes have."""

from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from clipattr.codes import SparseCodes, pool_tokens
from clipattr.metrics.random_examples import RandomExamples, shuffle
from clipattr.metrics.top_examples import TopExamples, TopPatches

N_PROCESSES, N_IMAGES, N_TOKENS, N_LATENTS, N_EXAMPLES = 2, 300, 4, 20, 6


def draw_codes() -> SparseCodes:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(N_IMAGES, N_TOKENS, N_LATENTS, generator=generator)
    indices = weights.topk(3, dim=-1).indices
    # Ties, also between images of different processes.
    values = torch.randint(0, 40, indices.shape, generator=generator) / 8
    return SparseCodes(indices, values, N_LATENTS)


def find_examples(rows: Tensor) -> list[Tensor]:
    """Of some rows, in two batches of which the last is small: ids of images, places, sample."""
    codes = draw_codes()
    sizes = {"n_latents": N_LATENTS, "n_examples": N_EXAMPLES}
    images = TopExamples(**sizes)
    patches = TopPatches(**sizes, n_tokens=N_TOKENS)
    sample = RandomExamples(**sizes, seed=3)
    for batch in rows.split(max(1, len(rows) - 10)):
        pooled = pool_tokens(codes.select(batch), "mean")
        images.update(pooled, batch)
        sample.update(pooled, batch)
        patches.update(codes.select(batch), batch)
    of_patches = patches.compute()
    places = of_patches.images * N_TOKENS + of_patches.tokens
    first = [*images.compute(), places, of_patches.values, *sample.compute()]
    # Each process has its own state again, and goes on with it.
    pooled = pool_tokens(codes.select(rows[:0]), "mean")
    images.update(pooled, rows[:0])
    sample.update(pooled, rows[:0])
    again = [*images.compute(), *sample.compute()]
    assert all(map(torch.equal, again, first[:2] + first[4:]))
    return first


def best_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """By argsort of each latent's column; all of them fire often enough."""
    ids = values.T.argsort(dim=1, descending=True, stable=True)[:, :N_EXAMPLES]
    return ids, values.T.gather(1, ids)


def run_process(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=N_PROCESSES
    )
    rows = torch.randperm(N_IMAGES, generator=torch.Generator().manual_seed(1))
    torch.save(find_examples(rows[:200] if rank == 0 else rows[200:]), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def check(found: list[Tensor]) -> None:
    dense = draw_codes().to_dense()
    pooled = dense.mean(dim=1)
    for ours, wanted in zip(found[:2], best_of(pooled), strict=True):
        assert torch.equal(ours, wanted)
    for ours, wanted in zip(found[2:4], best_of(dense.flatten(0, 1)), strict=True):
        assert torch.equal(ours, wanted)
    hashes = shuffle(torch.arange(N_IMAGES), 3)[:, None].expand(-1, N_LATENTS)
    smallest = hashes.masked_fill(pooled == 0, 2**32).argsort(dim=0)[:N_EXAMPLES].T
    assert torch.equal(found[4].sort(dim=1).values, smallest.sort(dim=1).values)
    assert torch.equal(found[5], pooled.T.gather(1, found[4]))


def test_one_process_equals_argsort():
    check(find_examples(torch.arange(N_IMAGES)))


def test_two_processes_equal_argsort(tmp_path: Path):
    spawn(run_process, args=(str(tmp_path),), nprocs=N_PROCESSES)
    for rank in range(N_PROCESSES):
        check(torch.load(tmp_path / f"{rank}.pt"))

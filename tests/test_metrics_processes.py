"""Two real processes, the second of which has no rows: each sees what one process would."""

from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from clipattr.codes import SparseCodes
from clipattr.metrics.per_image import PerImage
from clipattr.metrics.reconstruction import Reconstruction
from clipattr.metrics.top_examples import TopExamples

N_PROCESSES, N_LATENTS, D_MODEL = 2, 6, 3


def compute_on(rows: torch.Tensor) -> list[torch.Tensor]:
    """All results of the three metrics after an update with the given rows out of ten."""
    generator = torch.Generator().manual_seed(0)
    x = 10 + torch.randn(10, D_MODEL, generator=generator)
    indices = torch.rand(10, N_LATENTS, generator=generator).topk(2, dim=1).indices
    codes = SparseCodes(indices, torch.rand(10, 2, generator=generator), N_LATENTS)
    reconstruction = Reconstruction(d_model=D_MODEL, n_latents=N_LATENTS)
    examples = TopExamples(n_latents=N_LATENTS, n_examples=2)
    per_image = PerImage(["one", "two"])
    if len(rows):
        reconstruction.update(x[rows], x[rows] + 0.1, codes.select(rows))
        examples.update(codes.select(rows), rows)
        per_image.update(rows, x[rows, :2])
    return [*reconstruction.compute(), *examples.compute(), *per_image.compute()]


def run_process(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=N_PROCESSES
    )
    rows = torch.arange(10) if rank == 0 else torch.arange(0)
    torch.save(compute_on(rows), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    spawn(run_process, args=(str(tmp_path),), nprocs=N_PROCESSES)
    expected = compute_on(torch.arange(10))
    for rank in range(N_PROCESSES):
        for found, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, wanted)

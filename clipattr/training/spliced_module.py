"""Test-only module: reads x, codes and error once per batch, and hands them to the callbacks."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from clipattr.spliced import Readout, Spliced


class SplicedModule(L.LightningModule):
    """`Trainer.test` on activations; writes no checkpoint.

    A batch is (x, row numbers), or (x, row numbers, rest) where the suffix needs more than x.
    """

    def __init__(self, spliced: Spliced) -> None:
        super().__init__()
        self.spliced = spliced

    def test_step(self, batch: Sequence[Any], batch_idx: int) -> dict[str, Readout]:
        """What every callback takes."""
        return {"readout": self.spliced.read(*batch)}


def rows_loader(
    x: Float[Tensor, "row model"], *, batch_size: int, rank: int = 0, world_size: int = 1
) -> DataLoader[tuple[Tensor, ...]]:
    """Every row exactly once over all ranks, in order, with its number; no padding."""
    rows = torch.arange(rank, len(x), world_size)
    dataset = torch.utils.data.TensorDataset(x[rows], rows)
    return DataLoader(dataset, batch_size=batch_size)

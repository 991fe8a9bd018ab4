"""What the evaluation callbacks share: they see readouts, and their metrics follow the module."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric

from clipattr.clip.cut import Rest
from clipattr.spliced import Readout, Spliced

Batch = tuple[Tensor, Tensor, Rest]  # x, row of each image in the evaluated set, rest


class ReadoutCallback(Callback):
    """A callback on the readouts of `Trainer.test`; `take_all` shows them without a trainer."""

    def __init__(self, *metrics: Metric) -> None:
        self._metrics = metrics

    def start(self, device: torch.device | str) -> None:
        """Empty states, where the readouts will be."""
        for metric in self._metrics:
            metric.to(device)
            metric.reset()

    def take(self, readout: Readout) -> None:
        """Update the metrics; no collective may be called here."""
        raise NotImplementedError

    def finish(self) -> None:
        """Fill the results from the metrics, merged over processes."""
        raise NotImplementedError

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """States live where the module does."""
        self.start(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand over the readout."""
        self.take(outputs["readout"])

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All batches were seen."""
        self.finish()


@torch.no_grad()
def take_all(spliced: Spliced, batches: Iterable[Batch], *callbacks: ReadoutCallback) -> None:
    """Every batch, read once, to every callback: `Trainer.test` without a trainer.

    table = FaithfulnessCallback(spliced, weights, targets, ...)
    take_all(spliced, batches, table)
    table.finish()
    """
    device = spliced.sae.b_dec.device
    for callback in callbacks:
        callback.start(device)
    for batch in batches:
        readout = spliced.read(*move_data_to_device(batch, device))
        for callback in callbacks:
            callback.take(readout)

"""What the evaluation callbacks share: they see readouts, and their metrics follow the module."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torchmetrics import Metric

from clipattr.spliced import Readout


class ReadoutCallback(Callback):
    """A callback on the readouts of `Trainer.test`."""

    def __init__(self, *metrics: Metric) -> None:
        self._metrics = metrics

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """States live where the module does."""
        for metric in self._metrics:
            metric.to(pl_module.device)
            metric.reset()

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

    def take(self, readout: Readout) -> None:
        """Update the metrics; no collective may be called here."""
        raise NotImplementedError

"""How many rows a second a run trains on, logged and kept for its end."""

import time

import lightning as L
from lightning.pytorch.callbacks import Callback

from clipattr.training.sae_module import SaeModule


class Throughput(Callback):
    """Rows per second since the last logged point: of the stream, and times the SAEs on it."""

    def __init__(self, batch_size: int, every: int) -> None:
        """`batch_size` is that of all devices; there is a point every `every` steps."""
        self.batch_size = batch_size
        self.every = every
        self.rate: float | None = None
        self._start = self._last = (0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock starts here: a resumed run counts its own steps."""
        self._start = self._last = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Log what the steps since the last point have reached."""
        if trainer.global_step % self.every:
            return
        assert isinstance(pl_module, SaeModule)
        now = (trainer.global_step, time.perf_counter())
        rate = self._between(self._last, now)
        pl_module.log("rows_per_second", rate)
        pl_module.log("sae_rows_per_second", rate * len(pl_module.running))
        self._last = now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The rate of all steps of this start; a run that was at its end already has none."""
        if trainer.global_step > self._start[0]:
            self.rate = self._between(self._start, (trainer.global_step, time.perf_counter()))

    def _between(self, first: tuple[int, float], last: tuple[int, float]) -> float:
        return (last[0] - first[0]) * self.batch_size / (last[1] - first[1])

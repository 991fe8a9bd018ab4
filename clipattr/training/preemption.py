"""Stop when the scheduler asks for it: save, and leave on all ranks together.

Lightning 2.6 answers SIGTERM with a collective inside the signal handler, which meets the other
ranks in the middle of something else: most stops of two processes end in a deadlock until the
process group times out. Here the handler sets a flag, and the ranks agree on it between two steps.
"""

import logging
import signal
from pathlib import Path
from types import FrameType

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STEPS_BETWEEN_QUESTIONS = 10


class Preemption(Callback):
    """On SIGTERM or SIGUSR1 to any rank: a checkpoint after the step, then the end of training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_asked = False
        self.has_stopped = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over; Lightning puts the handlers of before back after training."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        # Lightning's own answer costs a broadcast before every step, and is no longer wanted.
        loop = trainer.fit_loop.epoch_loop
        assert hasattr(loop, "_broadcast_sigterm_tensor"), "another Lightning: look at its signals"
        loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save and stop where a rank was asked to; several ranks agree every few steps."""
        is_alone = trainer.world_size == 1
        if not is_alone and trainer.global_step % STEPS_BETWEEN_QUESTIONS:
            return
        if self.is_asked if is_alone else self._is_any_asked(trainer, pl_module):
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")
            trainer.should_stop = True
            self.has_stopped = True

    def _is_any_asked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        asked = torch.tensor(int(self.is_asked), device=pl_module.device)
        return int(trainer.strategy.reduce(asked, reduce_op="sum")) > 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

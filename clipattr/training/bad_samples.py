"""Broken samples met in training: gathered from all ranks, listed in the run, and limited."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed

from clipattr.atomic import write_text
from clipattr.data.shards import BadSample, check_bad
from clipattr.runs import BAD_SAMPLES
from clipattr.training.images import ImageDataModule

logger = logging.getLogger(__name__)

STEPS_BETWEEN_COUNTS = 10
# A stream has no size: of its first samples more may be broken by chance than of all of them.
SMALLEST_COUNT = 10_000


class BadSampleLimit(Callback):
    """Stops all ranks together when more than a share of the samples is broken.

    `<folder>/bad_samples.jsonl` lists each of them once, over all ranks and starts of the run.
    """

    def __init__(
        self,
        data: ImageDataModule,
        folder: Path,
        *,
        max_bad_fraction: float,
        n_images: int | None,
        known: Sequence[BadSample] = (),
        batch_size: int,
    ) -> None:
        """Nothing is read before the training begins.

        Args:
            data: that meets the samples.
            folder: of the run.
            max_bad_fraction: share of all samples that may be broken.
            n_images: all samples; None for a stream, where it is those that were seen.
            known: samples that are left out from the start, such as those that lack a field.
            batch_size: samples of a step, over all devices.
        """
        self.data = data
        self.file = folder / BAD_SAMPLES
        self.max_bad_fraction = max_bad_fraction
        self.n_images = n_images
        self.known = known
        self.batch_size = batch_size
        self.found: dict[BadSample, None] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the list of the run's earlier starts."""
        self.found = dict.fromkeys([*self.known, *read_bad(self.file)])
        if self.known and trainer.is_global_zero:
            self._write()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Count what was met; several ranks do it together, every few steps."""
        is_last = trainer.global_step == trainer.max_steps
        if trainer.world_size > 1 and trainer.global_step % STEPS_BETWEEN_COUNTS and not is_last:
            return
        new = [bad for bad in self._gather(trainer, pl_module) if bad not in self.found]
        if not new:
            return
        self.found |= dict.fromkeys(new)
        if trainer.is_global_zero:
            self._write()
            for bad in new:
                logger.warning("left out %r of %s: %s", bad.key, bad.shard, bad.reason)
        n_seen = max(SMALLEST_COUNT, trainer.global_step * self.batch_size)
        check_bad(list(self.found), self.n_images or n_seen, self.max_bad_fraction)

    def _write(self) -> None:
        write_text(self.file, "".join(json.dumps(bad._asdict()) + "\n" for bad in self.found))

    def _gather(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[BadSample]:
        """What is new on any rank, the same list on all; one number is exchanged where none is."""
        new, self.data.new_bad = self.data.new_bad, []
        if trainer.world_size == 1:
            return new
        count = torch.tensor(len(new), device=pl_module.device)
        if not int(trainer.strategy.reduce(count, reduce_op="sum")):
            return []
        everywhere: list[list[BadSample]] = [[]] * trainer.world_size
        distributed.all_gather_object(everywhere, new)
        return [bad for found in everywhere for bad in found]


def read_bad(file: Path) -> list[BadSample]:
    """The samples that a list names; none where there is no list."""
    if not file.exists():
        return []
    return [BadSample(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]

"""Train one SAE on rows of activations."""

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, distributed

from clipattr.codes import SparseCodes
from clipattr.sae.constraints import normalise_decoder_, remove_parallel_gradient_
from clipattr.sae.dead import FiringHistory
from clipattr.sae.losses import sae_loss
from clipattr.sae.sae import Sae, SaeOutput
from clipattr.training.activations import ActivationDataModule
from clipattr.training.optim import warmup_hold_decay, with_schedule

INIT_ROWS = 8192


class SaeModule(L.LightningModule):
    """The loss of the architecture plus AuxK; the decoder's rows stay on the unit sphere."""

    def __init__(
        self,
        sae: Sae,
        *,
        lr: float,
        warmup: int,
        n_steps: int,
        k_aux: int,
        aux_coefficient: float,
        dead_after: int,
    ) -> None:
        super().__init__()
        self.sae = sae
        self.history = FiringHistory(sae.n_latents)
        self.lr = lr
        self.warmup = warmup
        self.n_steps = n_steps
        self.k_aux = k_aux
        self.aux_coefficient = aux_coefficient
        self.dead_after = dead_after

    def setup(self, stage: str) -> None:
        """Mean and scale from the first rows; DDP wraps and checkpoints are restored later."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, ActivationDataModule)
        self.sae.initialise_from(data.first_rows(INIT_ROWS))

    def training_step(
        self, batch: tuple[Float[Tensor, "batch model"]], batch_idx: int
    ) -> Float[Tensor, ""]:
        """One step on raw activations."""
        (x,) = batch
        output = self.sae(x)
        is_dead = self.history.is_dead(self.dead_after)
        loss = sae_loss(
            self.sae,
            x,
            output,
            is_dead=is_dead,
            k_aux=self.k_aux,
            aux_coefficient=self.aux_coefficient,
        )
        self._count_firings(output.codes, len(x))
        self._update_statistics(output)
        self.log("train/fvu", loss.reconstruction.detach(), prog_bar=True)
        self.log("train/aux", loss.auxiliary.detach())
        self.log("train/dead", is_dead.double().mean(), prog_bar=True)
        return loss.total

    def _count_firings(self, codes: SparseCodes, n_rows: int) -> None:
        """Rows are those of all ranks, and a latent that fired on one of them has fired."""
        self.history.update(codes, n_rows * self.trainer.world_size)
        if self.trainer.world_size > 1:
            distributed.all_reduce(self.history.rows_since_fired, distributed.ReduceOp.MIN)

    def _update_statistics(self, output: SaeOutput) -> None:
        """All ranks start from the same, so the mean of theirs has taken in all their batches."""
        for statistic in self.sae.update_statistics(output):
            if self.trainer.world_size > 1:
                distributed.all_reduce(statistic)
                statistic.div_(self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before clipping, so that the clipped norm is that of the gradient which is used."""
        remove_parallel_gradient_(self.sae.W_dec)

    def optimizer_step(self, *arguments: object, **keywords: object) -> None:
        """Renormalise here: checkpoints are written before on_train_batch_end of the module."""
        super().optimizer_step(*arguments, **keywords)  # pyright: ignore[reportArgumentType]
        normalise_decoder_(self.sae.W_dec)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam without weight decay."""
        optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.lr, fused=True)
        return with_schedule(optimizer, warmup_hold_decay(self.warmup, self.n_steps))

"""Train a linear probe on rows of normalised embeddings and labels."""

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipattr.probes.linear import LinearProbe
from clipattr.training.optim import decay_groups, warmup_cosine, with_schedule


class ProbeModule(L.LightningModule):
    """Cross-entropy of the probe's logits."""

    def __init__(self, probe: LinearProbe, *, lr: float, weight_decay: float, n_steps: int) -> None:
        super().__init__()
        self.probe = probe
        self.lr = lr
        self.weight_decay = weight_decay
        self.n_steps = n_steps

    def training_step(
        self, batch: tuple[Float[Tensor, "batch embed"], Int[Tensor, " batch"]], batch_idx: int
    ) -> Float[Tensor, ""]:
        """One step."""
        features, labels = batch
        logits = self.probe(features)
        loss = cross_entropy(logits, labels)
        self.log("train/loss", loss.detach(), prog_bar=True)
        accuracy = (logits.argmax(dim=1) == labels).double().mean()
        self.log("train/accuracy", accuracy, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, cosine to zero."""
        groups = decay_groups(self.probe.named_parameters(), self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        return with_schedule(optimizer, warmup_cosine(0, self.n_steps))

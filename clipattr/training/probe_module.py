"""Train one head of any kind on rows of features and labels."""

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from clipattr.codes import SparseCodes
from clipattr.training.optim import decay_groups, warmup_cosine, with_schedule

Inputs = Float[Tensor, "batch *token embed"] | SparseCodes
Targets = Int[Tensor, " batch"] | Float[Tensor, "batch class"]


class ProbeModule(L.LightningModule):
    """Cross-entropy of the head's logits; of several labels the mean of theirs."""

    class_weight: Tensor | None

    def __init__(
        self,
        probe: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        n_steps: int,
        class_weight: Float[Tensor, " class"] | None = None,
    ) -> None:
        """`class_weight` is what rows of each class count, or of several labels the positives."""
        super().__init__()
        self.probe = probe
        self.lr = lr
        self.weight_decay = weight_decay
        self.n_steps = n_steps
        self.register_buffer("class_weight", class_weight, persistent=False)

    def training_step(self, batch: tuple[Inputs, Targets], batch_idx: int) -> Float[Tensor, ""]:
        """One step."""
        features, targets = batch
        logits = self.probe(features)
        if targets.is_floating_point():
            loss = binary_cross_entropy_with_logits(logits, targets, pos_weight=self.class_weight)
            is_right = (logits > 0) == (targets > 0)
        else:
            loss = cross_entropy(logits, targets, self.class_weight)
            is_right = logits.argmax(dim=1) == targets
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/accuracy", is_right.double().mean(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, cosine to zero."""
        groups = decay_groups(self.probe.named_parameters(), self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        return with_schedule(optimizer, warmup_cosine(0, self.n_steps))

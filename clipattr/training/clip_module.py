"""Train an open_clip model with open_clip's contrastive loss."""

import math
from typing import cast

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from clipattr.training.optim import decay_groups, warmup_cosine, with_schedule

MAX_LOGIT_SCALE = 100.0


class ClipModule(L.LightningModule):
    """Symmetric cross-entropy between the images and captions of a batch (over all ranks)."""

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, warmup: int, n_steps: int
    ) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.n_steps = n_steps
        self.loss: ClipLoss | None = None

    def setup(self, stage: str) -> None:
        """The loss gathers the other ranks' embeddings."""
        self.loss = ClipLoss(
            local_loss=True,
            gather_with_grad=True,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )

    def training_step(
        self,
        batch: tuple[Float[Tensor, "batch channel height width"], Int[Tensor, "batch position"]],
        batch_idx: int,
    ) -> Float[Tensor, ""]:
        """One contrastive loss."""
        assert self.loss is not None
        images, tokens = batch
        image_embeddings, text_embeddings, logit_scale, *_ = self.model(images, tokens)
        loss = self.loss(image_embeddings.float(), text_embeddings.float(), logit_scale)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/logit_scale", logit_scale.detach())
        return loss

    def optimizer_step(self, *arguments: object, **keywords: object) -> None:
        """Keep the logit scale in CLIP's range after every real step."""
        super().optimizer_step(*arguments, **keywords)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            cast(Tensor, self.model.logit_scale).clamp_(0.0, math.log(MAX_LOGIT_SCALE))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the betas of CLIP."""
        groups = decay_groups(self.model.named_parameters(), self.weight_decay)
        # Not fused: Lightning refuses to clip gradients of a fused optimiser in mixed precision.
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        return with_schedule(optimizer, warmup_cosine(self.warmup, self.n_steps))

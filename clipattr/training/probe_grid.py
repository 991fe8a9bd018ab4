"""Train a grid of linear probes in one pass over the features: rates x weight decays."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from clipattr.errors import ConfigError
from clipattr.probes.grid import ProbeGrid
from clipattr.probes.linear import LinearProbe
from clipattr.probes.losses import head_losses
from clipattr.training.optim import decay_groups, warmup_cosine, with_schedule

Optimiser = Literal["adamw", "sgd"]
"""AdamW, or SGD with a momentum of 0.9."""


class GridPoint(NamedTuple):
    """How one member is trained."""

    lr: float
    weight_decay: float

    @property
    def name(self) -> str:
        """As in the log."""
        return f"lr={self.lr:g},wd={self.weight_decay:g}"


class ProbeGridModule(L.LightningModule):
    """Minimises the sum of the members' losses: each ends as in a run of its own.

    No parameter, moment or clipped norm is shared, so one that diverges leaves the others alone
    (GridScores counts it as wrong everywhere).
    """

    class_weight: Tensor | None

    def __init__(
        self,
        probes: Sequence[LinearProbe],
        points: Sequence[GridPoint],
        *,
        n_steps: int,
        optimiser: Optimiser = "adamw",
        class_weight: Float[Tensor, " class"] | None = None,
    ) -> None:
        """`probes` and `points` belong together one by one."""
        super().__init__()
        if len(probes) != len(points) or len(set(points)) != len(points):
            raise ConfigError(
                f"{len(probes)} probes for the grid {[one.name for one in points]}: "
                "each point once, with a probe of its own"
            )
        self.grid = ProbeGrid(probes)
        self.points = tuple(points)
        self.n_steps = n_steps
        self.optimiser: Optimiser = optimiser
        self.register_buffer("class_weight", class_weight)

    def training_step(
        self,
        batch: tuple[
            Float[Tensor, "batch embed"], Int[Tensor, " batch"] | Float[Tensor, "batch class"]
        ],
        batch_idx: int,
    ) -> Float[Tensor, ""]:
        """One step of all members."""
        features, targets = batch
        losses = head_losses(self.grid(features), targets, self.class_weight)
        # A number for each member costs more than its step: only where they are written down.
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if (self.trainer.global_step + 1) % every == 0:
            parts = zip(self.points, losses.detach(), strict=True)
            self.log_dict({f"{point.name}/loss": loss for point, loss in parts})
        return losses.sum()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Of each by itself: one with a large gradient must not make the steps of others small."""
        if gradient_clip_val is not None:
            for probe in self.grid.probes:
                clip_grad_norm_(probe.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A rate and a decay for each, cosine to zero."""
        groups = [
            {**group, "lr": point.lr}
            for probe, point in zip(self.grid.probes, self.points, strict=True)
            for group in decay_groups(probe.named_parameters(), point.weight_decay)
        ]
        if self.optimiser == "adamw":
            optimizer = torch.optim.AdamW(groups, fused=True)
        else:
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        return with_schedule(optimizer, warmup_cosine(0, self.n_steps))

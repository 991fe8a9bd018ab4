"""Train the last blocks of an image tower with a linear probe on the normalised embedding.

The tower is cut in front of the first block that learns. The half before it runs without a
gradient, so that a step costs one forward of the whole and one backward of the rest, no more.

References: Wortsman et al. 2022, Robust fine-tuning of zero-shot models (`move_back`); Kumar et al.
2022, Fine-tuning can distort pretrained features (a head that was trained before).
"""

from typing import cast

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clipattr.clip import Clip, Cut, Site, image_tower
from clipattr.clip.images import ImageTrunk
from clipattr.errors import ConfigError
from clipattr.probes.linear import LinearProbe
from clipattr.training.optim import decay_groups, warmup_cosine, with_schedule


class FinetuneModule(L.LightningModule):
    """Cross-entropy of probe(suffix(x) / ||suffix(x)||), x without gradient.

    The model is in evaluation mode: no dropout, and no patch is dropped. What is saved in a
    checkpoint is what learns: the weights behind the cut, in the order of the model, and the probe.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        clip: Clip,
        probe: LinearProbe,
        *,
        blocks: int,
        lr: float,
        head_lr: float,
        weight_decay: float,
        warmup: int,
        n_steps: int,
        class_weight: Float[Tensor, " class"] | None = None,
    ) -> None:
        """Makes the weights behind the cut learn; all others of the model stay frozen.

        Args:
            clip: the model, whose weights are changed in place.
            probe: the head, where it starts.
            blocks: of the image tower that learn, counted from the end.
            lr: of the tower, at its peak.
            head_lr: of the probe.
            weight_decay: on matrices.
            warmup: steps of linear warm-up.
            n_steps: of the whole training.
            class_weight: what an image of each class counts; 1 on average over the images.
        """
        super().__init__()
        self.cut = cut_before(clip, blocks)
        self.by_name = unfreeze(clip, self.cut)
        self.learned = nn.ParameterList(self.by_name.values())
        self.probe = probe
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.rates = (lr, head_lr)
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.n_steps = n_steps
        self.start = [each.detach().clone() for each in self._all()]

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch class"]:
        """Logits, of which the head is computed in float32."""
        with torch.no_grad():
            x, rest = self.cut.prefix(images)
        embeddings = self.cut.suffix(x, rest)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.probe(normalize(embeddings.float(), dim=-1))

    def training_step(
        self,
        batch: tuple[Float[Tensor, "batch channel height width"], Int[Tensor, " batch"]],
        batch_idx: int,
    ) -> Float[Tensor, ""]:
        """One step."""
        images, labels = batch
        logits = self(images)
        losses = cross_entropy(logits, labels, reduction="none")
        if self.class_weight is not None:
            # Not divided by the weights of the batch: the mean over ranks is that of the whole.
            losses = losses * self.class_weight[labels]
        loss = losses.mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        accuracy = (logits.argmax(dim=1) == labels).double().mean()
        self.log("train/accuracy", accuracy, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, cosine to zero, with a rate for the tower and one for the head."""
        tower, head = (
            [group | {"lr": rate} for group in decay_groups(named, self.weight_decay)]
            for named, rate in zip(
                (self.by_name.items(), self.probe.named_parameters()), self.rates, strict=True
            )
        )
        # Not fused: Lightning refuses to clip gradients of a fused optimiser in mixed precision.
        optimizer = torch.optim.AdamW([*tower, *head])
        return with_schedule(optimizer, warmup_cosine(self.warmup, self.n_steps))

    @torch.no_grad()
    def move_back(self, alpha: float) -> None:
        """To (1 - alpha) start + alpha end, of all that has learned."""
        for end, start in zip(self._all(), self.start, strict=True):
            end.copy_(start.to(end.device).lerp(end, alpha))

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether what has learned is, and what it says of a blank image."""
        assert isinstance(self.cut.trunk, ImageTrunk), "it is that of images"
        blank = torch.zeros(1, 3, *self.cut.trunk.image_size, device=self._all()[0].device)
        return all(bool(each.isfinite().all()) for each in [*self._all(), self(blank)])

    def _all(self) -> list[nn.Parameter]:
        return [*self.learned, *self.probe.parameters()]


def cut_before(clip: Clip, blocks: int) -> Cut:
    """The image tower cut in front of its last blocks; ConfigError where it has not so many."""
    tower = image_tower(clip.model)
    if not 0 <= blocks <= tower.n_layers:
        raise ConfigError(
            f"finetune.blocks={blocks}: the image tower of {clip.name!r} has {tower.n_layers} "
            f"blocks, allowed are 0 to {tower.n_layers}"
        )
    if blocks == 0:
        return tower.cut(Site(-1, "residual", "all"))
    return tower.cut(Site(tower.n_layers - blocks, "residual_before", "all"))


def unfreeze(clip: Clip, cut: Cut) -> dict[str, nn.Parameter]:
    """Let everything learn on which the suffix depends and the prefix does not.

    Asked of the graph of one blank image: families of towers call their norms, pooling layers and
    projections by other names.
    """
    named = dict(cast(nn.Module, clip.model.visual).named_parameters())
    parameters = list(named.values())
    assert isinstance(cut.trunk, ImageTrunk), "it is that of images"
    blank = torch.zeros(1, 3, *cut.trunk.image_size, device=clip.device)
    for each in parameters:
        each.requires_grad_(True)
    x, rest = cut.prefix(blank)
    before = _reached(x, parameters)
    behind = _reached(cut.suffix(x.detach(), rest), parameters)
    learned = {}
    for (name, each), is_before, is_behind in zip(named.items(), before, behind, strict=True):
        each.requires_grad_(is_behind and not is_before)
        if each.requires_grad:
            learned[name] = each
    return learned


def _reached(output: Tensor, parameters: list[nn.Parameter]) -> list[bool]:
    """Which parameters the output depends on."""
    gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    return [gradient is not None for gradient in gradients]

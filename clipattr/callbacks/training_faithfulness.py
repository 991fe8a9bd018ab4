"""How faithful attribution is through an SAE while it trains, on a fixed set of held-out images."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from clipattr.callbacks.base import Batch, ReadoutCallback, take_all
from clipattr.callbacks.faithfulness import FaithfulnessCallback
from clipattr.clip.cut import Cut
from clipattr.config.choices import Method
from clipattr.metrics.reconstruction import Reconstruction
from clipattr.sae.sae import Sae
from clipattr.spliced import Readout, Spliced

METHODS = [Method.attribution_patching, Method.logit_lens]
NUMBERS = ("deletion_auc", "insertion_auc", "spearman_exact")


class HeldOut(NamedTuple):
    """Images at the site with all that the suffix needs, and what they are explained for."""

    cut: Cut
    batches: Sequence[Batch]
    """of this process, where several share the images"""
    weights: Float[Tensor, "class embed"]
    targets: Int[Tensor, " image"]
    """the class of each image, by its row number; rows that are beyond them are left out"""
    bias: Float[Tensor, " class"] | None = None
    """of a probe"""


@torch.no_grad()
def measure_faithfulness(sae: Sae, held_out: HeldOut, *, n_steps: int = 10) -> dict[str, float]:
    """The FVU, and of attribution patching and logit lens the areas and the rank agreement.

    Names are `fvu` and `<method>/<number>`; the numbers are those of `FaithfulnessCallback`, and
    nan where they are not defined. With several processes each gives its images, and all get the
    numbers of all. Nothing is drawn, and the SAE is left as it is: give one in eval mode.

    Raises:
        ConfigError: for `n_steps` below 1, and a target that is no row of the weights.
        DataError: when there is no image.
    """
    spliced = Spliced(held_out.cut, sae)
    table = FaithfulnessCallback(
        spliced,
        held_out.weights,
        held_out.targets,
        methods=METHODS,
        n_steps=n_steps,
        bias=held_out.bias,
        # Of other methods and of intervals, which are not asked for.
        ig_steps=1,
        overlap_top=1,
        resamples=1,
        seed=0,
    )
    reconstructed = _Reconstructed(sae)
    take_all(spliced, held_out.batches, table, reconstructed)
    found = {"fvu": float(reconstructed.metric.compute().fvu)}
    for method, numbers in table.means().items():
        found |= {f"{method.name}/{name}": float(numbers[name]) for name in NUMBERS}
    return found


class _Reconstructed(ReadoutCallback):
    """The reconstruction, of the same readouts."""

    def __init__(self, sae: Sae) -> None:
        self.metric = Reconstruction(d_model=sae.d_model, n_latents=sae.n_latents)
        super().__init__(self.metric)

    def take(self, readout: Readout) -> None:
        """Every token of the batch."""
        self.metric.update(readout.x, readout.recon, readout.codes)


@runtime_checkable
class TrainsSaes(Protocol):
    """What trains one SAE or more, such as `clipattr.training.sae_module.SaeModule`."""

    def snapshots(self) -> Iterator[tuple[str, Sae]]:
        """By name, a copy of each as it would be saved if training ended here."""
        ...


class TrainingFaithfulness(Callback):
    """Logs `measure_faithfulness` every `every` steps: of `val`, or of `<member>/val` in a grid.

    The SAE is a copy, as it would be saved at that step. Training does not notice: neither random
    state nor gradients nor modes are touched, so that weights are the same bits as without this.
    """

    def __init__(
        self, open_held_out: Callable[[L.Trainer], HeldOut], *, every: int, n_steps: int
    ) -> None:
        """What is measured, and when.

        Args:
            open_held_out: gives the images; every process calls it once, before training begins.
            every: steps of training between two measurements.
            n_steps: latents that a curve edits.
        """
        self.every = every
        self.n_steps = n_steps
        self._open = open_held_out
        self._held_out: HeldOut | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the images; a loader draws a number from the global random state."""
        if self._held_out is None:
            with isolate_rng():
                self._held_out = self._open(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Measure and log, where it is due."""
        if trainer.global_step % self.every:
            return
        assert self._held_out is not None, "after setup"
        assert isinstance(pl_module, TrainsSaes)
        found: dict[str, float] = {}
        for name, sae in pl_module.snapshots():
            prefix = f"{name}/val" if name else "val"
            numbers = measure_faithfulness(sae, self._held_out, n_steps=self.n_steps)
            found |= {f"{prefix}/{key}": value for key, value in numbers.items()}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                # Past the module's own log, which is read every `log_every` steps alone; a step
                # has the number that it has in the other curves.
                logger.log_metrics(found, step=trainer.global_step - 1)
                logger.save()

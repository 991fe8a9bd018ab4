"""Train one SAE, or a grid of them side by side, on rows of activations."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, distributed, nn

from clipattr.errors import ConfigError, DataError
from clipattr.sae.sae import Sae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.optim import warmup_hold_decay, with_schedule
from clipattr.training.sae_member import SaeMember, SaeStep, zero_of
from clipattr.training.sharded import gather_checkpoint, is_sharded, n_parts, slice_checkpoint

logger = logging.getLogger(__name__)

INIT_ROWS = 8192


class SaeModule(L.LightningModule):
    """SAEs that share nothing but the rows: each ends with the bits that it has when trained alone.

    What is minimised is the sum of their losses, in which no parameter is in two of them. One whose
    loss or gradient is not finite is stopped before it takes that step, and the others go on; when
    none is left, training ends with a DataError.
    """

    def __init__(self, members: Mapping[str, SaeMember], *, n_steps: int) -> None:
        """`members` by name; one alone may have the name ''."""
        super().__init__()
        self.by_name = dict(members)
        self.members = nn.ModuleList(members.values())
        self.n_steps = n_steps
        self.failures: dict[str, str] = {}

    @property
    def running(self) -> dict[str, SaeMember]:
        """Those that have not failed."""
        return {name: one for name, one in self.by_name.items() if name not in self.failures}

    @property
    def data(self) -> ActivationDataModule:
        """Where the rows come from."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, ActivationDataModule)
        return data

    def setup(self, stage: str) -> None:
        """Mean and scale from the first rows; DDP wraps and checkpoints are restored later."""
        rows = self.data.first_rows(INIT_ROWS)
        for member in self.by_name.values():
            member.initialise_from(*rows)
            if is_sharded(self.trainer):
                member.shard(self.trainer.global_rank, self.trainer.world_size)

    def training_step(
        self, batch: tuple[Float[Tensor, "batch _"], ...], batch_idx: int
    ) -> Float[Tensor, ""]:
        """One step of all that are running, on raw activations: x, of transcoders x and y."""
        for member in self.running.values():
            member.anneal(self.trainer.global_step)
        steps = {
            name: member(*batch, average=self._average) for name, member in self.running.items()
        }
        is_finite = self._agree([step.loss.total for step in steps.values()])
        self._stop([name for name, fine in zip(steps, is_finite, strict=True) if not fine], "loss")
        for name, member in self.running.items():
            member.take_in(steps[name].output, n_parts(self.trainer))
            self._log_step(name, steps[name])
        for name in self.failures:
            self.log(f"{name}/fvu", torch.nan)  # or a logger repeats the last number
        total = torch.stack([steps[name].loss.total for name in self.running]).sum()
        if self.failures and self.trainer.world_size > 1:
            # DDP waits for a gradient of every parameter that it has seen at the beginning.
            total = total + zero_of(self.by_name[name] for name in self.failures)
        return total

    def _log_step(self, name: str, step: SaeStep) -> None:
        prefix, is_alone = name or "train", len(self.by_name) == 1
        self.log(f"{prefix}/fvu", step.loss.reconstruction.detach(), prog_bar=is_alone)
        self.log(f"{prefix}/aux", step.loss.auxiliary.detach())
        dead, is_part = step.is_dead.double().mean(), is_sharded(self.trainer)
        self.log(f"{prefix}/dead", dead, prog_bar=is_alone, sync_dist=is_part)

    def _average(self, value: Tensor) -> Tensor:
        """Over all ranks."""
        if n_parts(self.trainer) == 1:
            return value
        total = value.clone()
        distributed.all_reduce(total)
        return total / self.trainer.world_size

    def _agree(self, losses: list[Tensor]) -> list[bool]:
        """Which of them are finite on all ranks."""
        is_finite = torch.stack([loss.detach().isfinite() for loss in losses]).int()
        if self.trainer.world_size > 1:
            distributed.all_reduce(is_finite, distributed.ReduceOp.MIN)
        return is_finite.bool().tolist()

    def _stop(self, names: list[str], what: str) -> None:
        if not names:
            return
        step = self.trainer.global_step
        where = f"the {what} is not finite at step {step}; {self.data.describe_batch(step)}"
        self.failures |= dict.fromkeys(names, where)
        if not self.running:
            raise DataError(where)
        logger.error("stopped %s: %s", " and ".join(names), where)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What was stopped has no gradient; DDP has given it one."""
        for name, member in self.by_name.items():
            if name in self.failures:
                member.drop_gradient()
            else:
                member.remove_parallel_gradient()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Of each by itself: one with a large gradient must not make the steps of others small."""
        failed = [
            name
            for name, member in self.running.items()
            if not member.clip_gradient(gradient_clip_val)
        ]
        for name in failed:
            self.by_name[name].drop_gradient()
        self._stop(failed, "gradient")

    def optimizer_step(self, *arguments: object, **keywords: object) -> None:
        """Renormalise here: checkpoints are written before on_train_batch_end of the module."""
        super().optimizer_step(*arguments, **keywords)  # pyright: ignore[reportArgumentType]
        for member in self.running.values():
            member.after_step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam without weight decay, with a rate and a schedule for each."""
        members = self.by_name.values()
        groups = [{"params": list(one.sae.named_parameters()), "lr": one.lr} for one in members]
        optimizer = torch.optim.Adam(groups, fused=True)
        return with_schedule(
            optimizer, [warmup_hold_decay(m.warmup, self.n_steps) for m in members]
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run does not wake what was stopped."""
        checkpoint["failures"] = dict(self.failures)
        if is_sharded(self.trainer):
            gather_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As it was saved."""
        self.failures = dict(checkpoint["failures"])
        if is_sharded(self.trainer):
            slice_checkpoint(checkpoint, self.trainer.global_rank, self.trainer.world_size)

    def snapshots(self) -> Iterator[tuple[str, Sae]]:
        """By name, a copy of each that is running as it would be saved if training ended here."""
        if is_sharded(self.trainer):
            raise ConfigError(
                "an SAE whose latents are divided among processes cannot be copied while it "
                "trains: none of them has it as a whole"
            )
        for name, member in self.running.items():
            yield name, member.snapshot()

    def gather(self) -> None:
        """After training: the first process has every SAE as a whole, if latents were divided."""
        if is_sharded(self.trainer):
            for member in self.running.values():
                member.gather(self.trainer.strategy.root_device)

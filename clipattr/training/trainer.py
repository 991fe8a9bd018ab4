"""Build the Lightning trainer from the settings; nothing here knows a method."""

import logging
import warnings
from datetime import timedelta
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger as LightningLogger
from lightning.pytorch.strategies import DDPStrategy

from clipattr.config.schema import Logger, Precision, TrainerConfig
from clipattr.errors import ConfigError
from clipattr.training.checkpoints import AtomicCheckpointIO, newest_valid

CHECKPOINTS = "checkpoints"
EXPECTED_WARNINGS = (
    "eval mode",  # the frozen CLIP is, on purpose
    "does not have many workers",  # rows are served from memory
    "is not empty",  # a checkpoint folder that a resume needs
    "dataloader is not resumable",  # its position is the datamodule's state
    "LeafSpec",  # Lightning's use of a name that torch has renamed
)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without the logger's version, which here is the word 'curves'."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What is shown at the end of the bar."""
        return {
            name: value
            for name, value in super().get_metrics(trainer, pl_module).items()
            if name != "v_num"
        }


def build_trainer(
    settings: TrainerConfig, folder: Path, *, callbacks: list[Callback] | None = None
) -> L.Trainer:
    """A trainer that logs to `folder` and saves its checkpoints there."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}.*")
    # Lightning prints its own lines; through the root logger each would appear twice.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    checkpoint = ModelCheckpoint(
        dirpath=folder / CHECKPOINTS,
        filename="{step}",
        every_n_train_steps=settings.checkpoint_every,
        save_top_k=2,
        monitor="step",
        mode="max",
    )
    bars: list[Callback] = [ProgressBar(refresh_rate=10)] if settings.progress else []
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=_strategy(settings),
        max_steps=settings.steps,
        max_epochs=-1,
        precision="bf16-mixed" if settings.precision is Precision.bf16 else "32-true",
        logger=_logger(settings.logger, folder),
        log_every_n_steps=min(settings.log_every, settings.steps),
        callbacks=[checkpoint, *bars, *(callbacks or [])],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        # Attribution needs gradients inside test steps; inference tensors could never have any.
        inference_mode=False,
        default_root_dir=folder,
    )


def fit(
    trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, folder: Path
) -> None:
    """Train, going on from the newest whole checkpoint of this run."""
    resume = newest_valid(folder / CHECKPOINTS)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)


def _strategy(settings: TrainerConfig) -> str | DDPStrategy:
    if settings.devices == 1:
        return "auto"
    # Counters differ between ranks on purpose, so rank 0 must not overwrite them.
    return DDPStrategy(
        broadcast_buffers=False, gradient_as_bucket_view=True, timeout=timedelta(minutes=5)
    )


def _logger(choice: Logger, folder: Path) -> LightningLogger:
    try:
        match choice:
            case Logger.csv:
                return CSVLogger(folder, name="", version="curves")
            case Logger.tensorboard:
                return TensorBoardLogger(folder, name="", version="curves")
            case Logger.wandb:
                return WandbLogger(name=folder.name, save_dir=folder)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"trainer.logger={choice.name}: the package is not installed; "
            f"pip install 'clipattr[{choice.name}]'"
        ) from error

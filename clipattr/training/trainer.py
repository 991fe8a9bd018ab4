"""Build the Lightning trainer from the settings; nothing here knows a method."""

import logging
import warnings
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger as LightningLogger
from lightning.pytorch.strategies import DDPStrategy

from clipattr.atomic import sweep_temporary
from clipattr.config.choices import Logger, Precision
from clipattr.config.schema import DeviceConfig, DevicesConfig, TrainerConfig
from clipattr.errors import ConfigError, Stopped
from clipattr.training.checkpoints import AtomicCheckpointIO, SameStart, newest_valid
from clipattr.training.preemption import Preemption
from clipattr.training.sharded import ShardedStrategy

CHECKPOINTS = "checkpoints"
EXPECTED_WARNINGS = (
    "eval mode",  # the frozen CLIP is, on purpose
    "does not have many workers",  # rows are served from memory
    "Checkpoint directory .* is not empty",  # a resume needs what is in it
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


def choose_accelerator(wanted: str) -> str:
    """The word gpu or cpu.

    `auto` is decided here and not by Lightning, which would take Apple's MPS: that has no float64,
    and CLIP is on the CPU.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "gpu" and not has_gpu:
        raise ConfigError("trainer.accelerator=gpu: no CUDA device was found; use cpu or auto")
    return "gpu" if has_gpu and wanted != "cpu" else "cpu"


def build_trainer(
    settings: TrainerConfig,
    folder: Path,
    *,
    callbacks: list[Callback] | None = None,
    shard_latents: bool = False,
) -> L.Trainer:
    """A trainer that logs to `folder` and saves its checkpoints there.

    With `shard_latents` several processes divide the latents of an SAE among them, and not rows.
    """
    _silence_what_is_wanted()
    checkpoint = ModelCheckpoint(
        dirpath=folder / CHECKPOINTS,
        filename="{step}",
        every_n_train_steps=settings.checkpoint_every,
        save_top_k=2,
        monitor="step",
        mode="max",
    )
    return L.Trainer(
        accelerator=choose_accelerator(settings.accelerator),
        devices=settings.devices,
        strategy=_strategy(settings, shard_latents),
        max_steps=settings.steps,
        max_epochs=-1,
        precision="bf16-mixed" if settings.precision is Precision.bf16 else "32-true",
        logger=_logger(settings.logger, folder),
        log_every_n_steps=min(settings.log_every, settings.steps),
        callbacks=[
            checkpoint,
            Preemption(folder / CHECKPOINTS),
            SameStart(),
            *_bars(settings),
            *(callbacks or []),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        default_root_dir=folder,
    )


def build_tester(settings: DeviceConfig, folder: Path, *, callbacks: list[Callback]) -> L.Trainer:
    """A trainer for `test` in float32, which logs and saves nothing: on one device, or on several.

    The loader of each process has to hold its own rows: nothing divides them.
    """
    n_devices = settings.devices if isinstance(settings, DevicesConfig) else 1
    _silence_what_is_wanted()
    return L.Trainer(
        accelerator=choose_accelerator(settings.accelerator),
        devices=n_devices,
        strategy="auto" if n_devices == 1 else DDPStrategy(timeout=timedelta(minutes=30)),
        logger=False,
        callbacks=[*_bars(settings), *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        # Attribution needs gradients inside test steps; inference tensors could never have any.
        inference_mode=False,
        default_root_dir=folder,
    )


def _silence_what_is_wanted() -> None:
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}.*")
    # Lightning prints its own lines; through the root logger each would appear twice.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def _bars(settings: DeviceConfig) -> list[Callback]:
    return [ProgressBar(refresh_rate=10)] if settings.progress else []


def fit(
    trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, folder: Path
) -> None:
    """Train, going on from the newest whole checkpoint of this run; Stopped when a signal came."""
    sweep_temporary(folder / CHECKPOINTS)
    resume = newest_valid(folder / CHECKPOINTS)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    if any(isinstance(one, Preemption) and one.has_stopped for one in trainer.callbacks):  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            # The launcher would kill rank 0 over another exit code.
            raise SystemExit(0)
        raise Stopped(
            f"stopped by a signal after step {trainer.global_step} of {trainer.max_steps}; the "
            "same command goes on from there"
        )


def _strategy(settings: TrainerConfig, shard_latents: bool) -> str | DDPStrategy:
    if settings.devices == 1:
        return "auto"
    if shard_latents:
        return ShardedStrategy(timeout=timedelta(minutes=30))
    # Counters differ between ranks on purpose, so rank 0 must not overwrite them. The time limit
    # turns a hang into an error; a rank may wait that long for another one's part of the cache.
    return DDPStrategy(
        broadcast_buffers=False, gradient_as_bucket_view=True, timeout=timedelta(minutes=30)
    )


def _logger(choice: Logger, folder: Path) -> LightningLogger:
    # Every start of a run writes a folder of its own: the CSV logger would empty an older one.
    n_before = len(list(folder.glob("curves*")))
    version = f"curves-{n_before + 1}" if n_before else "curves"
    try:
        match choice:
            case Logger.csv:
                return CSVLogger(folder, name="", version=version)
            case Logger.tensorboard:
                return TensorBoardLogger(folder, name="", version=version)
            case Logger.wandb:
                return WandbLogger(name=folder.name, save_dir=folder)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"trainer.logger={choice.name}: the package is not installed; "
            f"pip install 'clipattr[{choice.name}]'"
        ) from error

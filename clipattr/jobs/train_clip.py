"""Train a small CLIP from scratch on captioned shards, and save it as an open_clip folder."""

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from clipattr.clip.loading import Tokenizer, build_clip
from clipattr.clip.names import CONFIG_FILE, MERGES_FILE, WEIGHTS_FILE, architecture_folder
from clipattr.config.schema import TrainClip
from clipattr.data.pixels import Pixels
from clipattr.errors import DataError
from clipattr.jobs.images import open_training_images
from clipattr.jobs.start import Plan, describe_files, describe_shards
from clipattr.training.clip_module import ClipModule
from clipattr.training.trainer import build_trainer, fit


def train_clip(config: TrainClip, command: list[str]) -> None:
    """Train and save `<run>/model`, which `local-dir:` loads."""
    architecture = architecture_folder(config.clip.architecture)
    inputs: dict[str, object] = {
        "architecture": describe_files([architecture / CONFIG_FILE, architecture / MERGES_FILE]),
        "shards": describe_shards(config.data.shards, "data.shards"),
    }
    plan = Plan(config, command, inputs, ("model",))
    if plan.is_finished():
        return
    settings = config.trainer
    L.seed_everything(config.seed, workers=True, verbose=False)
    model, preprocess, tokenizer = build_clip(config.clip.architecture)
    images = open_training_images(
        config.data,
        Pixels(preprocess, config.data.decode.name),
        {"caption": partial(read_caption, tokenizer)},
        needed=("txt",),
        folder=Path(config.runs) / config.name,
        seed=config.seed,
        n_steps=settings.steps,
        progress=settings.progress,
    )
    run = plan.open()
    module = ClipModule(
        model,
        lr=config.clip.lr,
        weight_decay=config.clip.weight_decay,
        warmup=config.clip.warmup,
        n_steps=settings.steps,
    )
    trainer = build_trainer(settings, run.path, callbacks=[images.limit])
    fit(trainer, module, images.data, run.path)
    if trainer.is_global_zero:
        save_open_clip(model, config.clip.architecture, run.path / "model")
        run.update_manifest(data=images.fingerprint)
        run.write_metrics({"train": {"steps": settings.steps, "n_images": images.n_images}})
        run.finish()


def read_caption(tokenizer: Tokenizer, sample: Mapping[str, bytes]) -> Int[Tensor, " position"]:
    """The tokens of a sample's caption."""
    if "txt" not in sample:
        raise DataError("it has no caption (txt)")
    return tokenizer([sample["txt"].decode("utf-8")])[0]


def save_open_clip(model: torch.nn.Module, architecture: str, folder: Path) -> None:
    """Weights (float16) with the config and the merges they belong to, complete or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {
        name: value.detach().half().contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, temporary / WEIGHTS_FILE)
    for name in (CONFIG_FILE, MERGES_FILE):
        source = architecture_folder(architecture) / name
        if source.is_file():
            shutil.copyfile(source, temporary / name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)

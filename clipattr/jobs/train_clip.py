"""Train a small CLIP from scratch on captioned shards, and save it as an open_clip folder."""

import os
import shutil
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from clipattr.clip.loading import Preprocess, Tokenizer, build_clip
from clipattr.clip.names import CONFIG_FILE, MERGES_FILE, WEIGHTS_FILE, architecture_folder
from clipattr.config.schema import DataConfig, TrainClip
from clipattr.data.images import image_loader
from clipattr.data.index import ShardIndex
from clipattr.data.pixels import Pixels
from clipattr.data.shards import check_bad, read_text
from clipattr.jobs.model import find_images
from clipattr.jobs.start import Plan, describe_files, describe_shards
from clipattr.training.clip_module import ClipModule
from clipattr.training.rows import Rows, RowsDataModule
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
    L.seed_everything(config.seed, workers=True, verbose=False)
    model, preprocess, tokenizer = build_clip(config.clip.architecture)
    index, _ = find_images(
        config.data.shards, config.data, ("txt",), progress=config.trainer.progress
    )
    run = plan.open()

    def load() -> tuple[Rows, str]:
        return _pairs(index, preprocess, tokenizer, config.data), index.fingerprint

    settings = config.trainer
    data = RowsDataModule(
        load, batch_size=config.data.batch_size, seed=config.seed, n_steps=settings.steps
    )
    module = ClipModule(
        model,
        lr=config.clip.lr,
        weight_decay=config.clip.weight_decay,
        warmup=config.clip.warmup,
        n_steps=settings.steps,
    )
    trainer = build_trainer(settings, run.path)
    fit(trainer, module, data, run.path)
    if trainer.is_global_zero:
        save_open_clip(model, config.clip.architecture, run.path / "model")
        run.update_manifest(data=data.fingerprint)
        run.write_metrics({"train": {"steps": settings.steps, "n_images": len(index)}})
        run.finish()


def _pairs(
    index: ShardIndex, preprocess: Preprocess, tokenizer: Tokenizer, data: DataConfig
) -> Rows:
    """All images (bfloat16, 2 bytes per channel and pixel) and captions, held in memory."""
    images: list[Tensor] = []
    rows: list[Tensor] = []
    bad = []
    pixels = Pixels(preprocess)
    loader = image_loader(index, pixels, batch_size=data.batch_size, workers=data.workers)
    for batch in tqdm(loader, desc="decoding", unit="batch"):
        bad.extend(batch.bad)
        if len(batch.rows):
            images.append(pixels.normalise(batch.images).to(torch.bfloat16))
            rows.append(batch.rows)
    check_bad(bad, len(index), data.max_bad_fraction)
    captions = [read_text(index[row]) for row in torch.cat(rows).tolist()]
    return torch.cat(images), tokenizer(captions)


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

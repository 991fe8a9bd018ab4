"""Train a linear probe on the normalised image embeddings of labelled shards, of any CLIP."""

import logging

import lightning as L
import torch
from torch.nn.functional import normalize

from clipattr.clip import Clip
from clipattr.config.schema import TrainProbe
from clipattr.data import load_features
from clipattr.data.shards import read_label
from clipattr.data.store import hash_json
from clipattr.jobs.model import find_images, load_model, read_embeddings
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.probes.files import ProbeRecord, save_probe
from clipattr.probes.linear import LinearProbe
from clipattr.training.probe_module import ProbeModule
from clipattr.training.rows import Rows, RowsDataModule
from clipattr.training.trainer import build_trainer, fit

logger = logging.getLogger(__name__)


def train_probe(config: TrainProbe, command: list[str]) -> None:
    """Train and save `<run>/probe.safetensors` with `<run>/probe.json`."""
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
    }
    plan = Plan(config, command, inputs, ("probe.json", "probe.safetensors"))
    if plan.is_finished():
        return
    L.seed_everything(config.seed, workers=True, verbose=False)
    clip = load_model(config.model, config.trainer.accelerator)
    run = plan.open()
    settings = config.probe

    def load() -> tuple[Rows, str]:
        return _labelled_rows(config, clip)

    data = RowsDataModule(
        load, batch_size=settings.batch_size, seed=config.seed, n_steps=config.trainer.steps
    )
    probe = LinearProbe(clip.d_embed, len(settings.classes))
    module = ProbeModule(
        probe, lr=settings.lr, weight_decay=settings.weight_decay, n_steps=config.trainer.steps
    )
    trainer = build_trainer(config.trainer, run.path)
    fit(trainer, module, data, run.path)
    if trainer.is_global_zero:
        metrics = {"train_accuracy": measure(probe, data.rows)}
        record = ProbeRecord(
            class_names=list(settings.classes),
            model={"name": config.model.name, "weights_sha256": clip.weights_sha256},
            label_field=settings.label,
            data_fingerprint=data.fingerprint,
            metrics=metrics,
        )
        save_probe(probe, run.path, record)
        run.update_manifest(data=data.fingerprint)
        run.write_metrics({"probe": metrics})
        run.finish()
        logger.info("accuracy on the training rows: %.3f", metrics["train_accuracy"])


@torch.no_grad()
def measure(probe: LinearProbe, rows: Rows) -> float:
    """Share of the rows whose largest logit is that of their label."""
    features, labels = rows
    predictions = probe(features.to(probe.weight.device)).argmax(dim=1).cpu()
    return float((predictions == labels).double().mean())


def _labelled_rows(config: TrainProbe, clip: Clip) -> tuple[Rows, str]:
    data, settings = config.data, config.probe
    needed = ("cls",) if settings.label == "cls" else ("json",)
    progress = config.trainer.progress
    index, _ = find_images(data.shards, data, needed, progress=progress)
    labels = torch.tensor([read_label(one, settings.label, settings.classes) for one in index])
    store = read_embeddings(clip, index, data, progress=progress)
    x, images = load_features(store)
    return (normalize(x, dim=-1), labels[images]), hash_json(store.fingerprint)

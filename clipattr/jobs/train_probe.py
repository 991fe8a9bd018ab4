"""Train a linear probe on the normalised image embeddings of labelled shards, of any CLIP."""

import logging
from functools import partial

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.clip import Clip
from clipattr.config.schema import ProbeConfig, TrainProbe
from clipattr.data import ActivationStore, EvaluationStream, Ranks, ShardIndex
from clipattr.data.shards import read_label
from clipattr.data.store import hash_json
from clipattr.jobs.model import load_model, read_embeddings
from clipattr.jobs.shards import Images, find_images
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.probes.files import ProbeRecord, save_probe
from clipattr.probes.linear import LinearProbe
from clipattr.training.activations import ActivationDataModule
from clipattr.training.probe_module import ProbeModule
from clipattr.training.trainer import build_trainer, fit

logger = logging.getLogger(__name__)

ROWS = ("x", "images")


def train_probe(config: TrainProbe, command: list[str]) -> None:
    """Train and save `<run>/probe.safetensors` with `<run>/probe.json`."""
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
    }
    plan = Plan(config, command, inputs, ("probe.json", "probe.safetensors"))
    if plan.is_finished():
        return
    settings = config.probe
    L.seed_everything(config.seed, workers=True, verbose=False)
    clip = load_model(config.model, config.trainer.accelerator)
    needed = ("cls",) if settings.label == "cls" else ("json",)
    images = find_images(config.data.shards, config.data, needed, progress=config.trainer.progress)
    data = _rows(config, clip, images, _read_labels(images.usable, settings))
    run = plan.open()
    probe = LinearProbe(clip.d_embed, len(settings.classes))
    module = ProbeModule(
        probe, lr=settings.lr, weight_decay=settings.weight_decay, n_steps=config.trainer.steps
    )
    trainer = build_trainer(config.trainer, run.path)
    fit(trainer, module, data, run.path)
    if trainer.is_global_zero:
        assert data.store is not None, "it was trained on"
        fingerprint = hash_json(data.store.fingerprint)
        metrics = {"train_accuracy": measure(probe, data)}
        record = ProbeRecord(
            class_names=list(settings.classes),
            model={"name": config.model.name, "weights_sha256": clip.weights_sha256},
            label_field=settings.label,
            data_fingerprint=fingerprint,
            metrics=metrics,
        )
        save_probe(probe, run.path, record)
        run.write_bad([one._asdict() for one in (*images.bad, *data.store.bad)])
        run.update_manifest(data=fingerprint)
        run.write_metrics({"probe": metrics})
        run.finish()
        logger.info("accuracy on the training rows: %.3f", metrics["train_accuracy"])


@torch.no_grad()
def measure(probe: LinearProbe, data: ActivationDataModule) -> float:
    """Share of the rows whose largest logit is that of their label."""
    assert data.store is not None, "it was trained on"
    n_right = 0
    for batch in EvaluationStream(data.store, batch_size=data.batch_size, fields=ROWS):
        features, labels = data.finish(*batch)
        predictions = probe(features.to(probe.weight.device)).argmax(dim=1).cpu()
        n_right += int((predictions == labels).sum())
    return n_right / data.store.n_rows


def _rows(
    config: TrainProbe, clip: Clip, images: Images, labels: Int[Tensor, " image"]
) -> ActivationDataModule:
    """Embeddings with the labels of their images."""

    def open_store(ranks: Ranks) -> ActivationStore:
        progress = config.trainer.progress
        store = read_embeddings(clip, images.usable, config.data, ranks=ranks, progress=progress)
        images.add_bad(store.bad, config.data.max_bad_fraction)
        return store

    return ActivationDataModule(
        open_store,
        batch_size=config.probe.batch_size,
        seed=config.seed,
        n_steps=config.trainer.steps,
        fields=ROWS,
        finish=partial(_with_labels, labels),
    )


def _with_labels(
    labels: Int[Tensor, " image"], x: Float[Tensor, "row embed"], images: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "row embed"], Int[Tensor, " row"]]:
    return normalize(x.float(), dim=-1), labels.to(images.device)[images.long()]


def _read_labels(index: ShardIndex, settings: ProbeConfig) -> Int[Tensor, " image"]:
    return torch.tensor([read_label(one, settings.label, settings.classes) for one in index])

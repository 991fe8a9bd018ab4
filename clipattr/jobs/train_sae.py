"""Train a sparse autoencoder on cached activations, and measure it on held-out ones."""

import logging

import lightning as L
import torch

from clipattr.config.schema import TrainSae
from clipattr.data import ActivationStore, Ranks, load_features
from clipattr.data.store import hash_json
from clipattr.jobs.model import FrozenClip, find_images, load_frozen, read_activations
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.metrics.reconstruction import Reconstruction
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.sae.topk import TopKSae
from clipattr.training.activations import ActivationDataModule
from clipattr.training.sae_module import SaeModule
from clipattr.training.trainer import build_trainer, fit

logger = logging.getLogger(__name__)


def train_sae(config: TrainSae, command: list[str]) -> None:
    """Train and save `<run>/sae.safetensors` with `<run>/sae.json`."""
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
        "held_out": describe_shards(config.held_out, "held_out"),
    }
    plan = Plan(config, command, inputs, ("sae.json", "sae.safetensors"))
    if plan.is_finished():
        return
    L.seed_everything(config.seed, workers=True, verbose=False)
    frozen = load_frozen(config.model, config.site, config.trainer.accelerator)
    run = plan.open()
    progress = config.trainer.progress

    def open_store(ranks: Ranks) -> ActivationStore:
        images = find_images(config.data.shards, config.data, progress=progress)
        return read_activations(frozen, images.usable, config.data, ranks=ranks, progress=progress)

    data = ActivationDataModule(
        open_store, batch_size=config.sae.batch_size, seed=config.seed, n_steps=config.trainer.steps
    )
    module = _module(config, frozen.cut.d_site)
    trainer = build_trainer(config.trainer, run.path)
    fit(trainer, module, data, run.path)
    if trainer.is_global_zero:
        assert data.store is not None, "it was trained on"
        fingerprint = hash_json(data.store.fingerprint)
        metrics = measure(module.sae, frozen, config, progress=progress)
        record = SaeRecord(
            site=frozen.cut.site.to_json(),
            model={"name": config.model.name, "weights_sha256": frozen.clip.weights_sha256},
            data_fingerprint=fingerprint,
            metrics=metrics,
        )
        save_sae(module.sae, run.path, record)
        run.update_manifest(data=fingerprint)
        run.write_metrics({"sae": metrics})
        run.finish()


def _module(config: TrainSae, d_model: int) -> SaeModule:
    settings = config.sae
    generator = torch.Generator().manual_seed(config.seed)
    sae = TopKSae(d_model=d_model, n_latents=settings.n_latents, k=settings.k, generator=generator)
    return SaeModule(
        sae,
        lr=settings.lr,
        warmup=settings.warmup,
        n_steps=config.trainer.steps,
        k_aux=settings.k_aux or d_model // 2,
        aux_coefficient=settings.aux_coefficient,
        dead_after=settings.dead_after,
    )


def measure(
    sae: TopKSae, frozen: FrozenClip, config: TrainSae, *, progress: bool
) -> dict[str, float]:
    """Reconstruction of the held-out shards."""
    images = find_images(config.held_out, config.data, setting="held_out", progress=progress)
    x = load_features(read_activations(frozen, images.usable, config.data, progress=progress)).x
    # Only the first process measures; the others would never come to a gathering.
    metric = Reconstruction(d_model=sae.d_model, n_latents=sae.n_latents, sync_on_compute=False)
    with torch.no_grad():
        for rows in x.split(config.sae.batch_size):
            output = sae(rows.to(sae.W_dec.device))
            metric.update(rows, output.recon.cpu(), output.codes)
    result = metric.compute()
    metrics = {
        "fvu": float(result.fvu),
        "explained_variance": float(result.explained_variance),
        "l0": float(result.l0),
        "cosine": float(result.cosine),
        "dead_fraction": float(result.dead_fraction),
        "n_rows": float(result.n_rows),
    }
    logger.info(
        "held-out: FVU %.4f at L0 %.1f, %.1f %% of %d latents never fired on %d rows",
        metrics["fvu"],
        metrics["l0"],
        100 * metrics["dead_fraction"],
        sae.n_latents,
        int(metrics["n_rows"]),
    )
    return metrics

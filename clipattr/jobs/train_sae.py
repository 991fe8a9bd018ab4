"""Train a sparse autoencoder on cached activations, and measure it on held-out ones."""

import logging

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor

from clipattr.config.schema import TrainSae
from clipattr.data import ActivationStore, EvaluationStream, Ranks
from clipattr.data.store import hash_json
from clipattr.jobs.model import FrozenClip, load_frozen, read_activations
from clipattr.jobs.shards import find_images
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.metrics.exact_once import ExactOnce
from clipattr.metrics.reconstruction import Reconstruction, ReconstructionResult
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.sae.sae import Sae
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


def measure(sae: Sae, frozen: FrozenClip, config: TrainSae, *, progress: bool) -> dict[str, float]:
    """Reconstruction of the held-out shards."""
    images = find_images(config.held_out, config.data, setting="held_out", progress=progress)
    store = read_activations(frozen, images.usable, config.data, progress=progress)
    sae.eval().to(frozen.clip.device)  # the trainer has left it on the CPU
    result = reconstruct(sae, store, config.sae.batch_size)
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


@torch.no_grad()
def reconstruct(sae: Sae, store: ActivationStore, batch_size: int) -> ReconstructionResult:
    """How well the rows of a store are reconstructed, each of which is seen exactly once."""
    device = sae.W_dec.device
    # Only the first process measures; the others would never come to a gathering.
    metric = Reconstruction(d_model=sae.d_model, n_latents=sae.n_latents, sync_on_compute=False)
    metric.to(device)
    due = _number(store.load("images"), store.load("tokens"))
    proof = ExactOnce(due, sync_on_compute=False)
    for x, images, tokens in EvaluationStream(
        store, batch_size=batch_size, fields=("x", "images", "tokens")
    ):
        rows = x.to(device).float()
        output = sae(rows)
        metric.update(rows, output.recon, output.codes)
        proof.update(_number(images, tokens))
    proof.compute()
    return metric.compute()


def _number(images: Int[Tensor, " row"], tokens: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """One number for a token of an image; a store holds those of tokens in 16 bits."""
    return images.long() << 16 | tokens.long()

"""Train sparse autoencoders on cached activations, and measure them on held-out ones."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor

from clipattr.atomic import write_bytes, write_text
from clipattr.config.schema import TrainSae
from clipattr.data import ActivationStore, BadSample, EvaluationStream, Ranks
from clipattr.data.store import hash_json
from clipattr.jobs.class_head import load_classes
from clipattr.jobs.model import FrozenClip, load_frozen, read_activations
from clipattr.jobs.sae_members import build_member
from clipattr.jobs.shards import find_images
from clipattr.jobs.start import Plan, describe_model, describe_shards
from clipattr.jobs.training_faithfulness import watch_faithfulness
from clipattr.metrics.exact_once import ExactOnce
from clipattr.metrics.reconstruction import Reconstruction, ReconstructionResult
from clipattr.report.pareto import SaePoint, pareto_png, pareto_table
from clipattr.runs import RunFolder
from clipattr.sae.files import SaeRecord, save_sae
from clipattr.sae.sae import Sae
from clipattr.sae.transcoder import Transcoder
from clipattr.training.activations import ActivationDataModule
from clipattr.training.sae_module import SaeModule
from clipattr.training.throughput import Throughput
from clipattr.training.trainer import build_trainer, fit

logger = logging.getLogger(__name__)

METRICS, TABLE, PICTURE = "metrics.json", "pareto.csv", "pareto.png"
FILES = ("sae.json", "sae.safetensors")


def train_sae(config: TrainSae, command: list[str]) -> None:
    """Train and save `<run>/sae.safetensors` with `<run>/sae.json`; of a grid, each in a folder."""
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
        "held_out": describe_shards(config.held_out, "held_out"),
    }
    if config.faithfulness is not None:
        inputs["prompts"] = load_classes(config.faithfulness).fingerprint
    plan = Plan(config, command, inputs, _outputs(config))
    if plan.is_finished():
        return
    L.seed_everything(config.seed, workers=True, verbose=False)
    frozen = load_frozen(config.model, config.site, config.trainer.accelerator, config.target)
    run = plan.open()
    bad: list[BadSample] = []
    data = _open_data(config, frozen, bad)
    d_out = None if frozen.target is None else frozen.target.cut.d_site
    members = {
        name: build_member(settings, frozen.cut.d_site, config.seed, d_out)
        for name, settings in config.sae.members().items()
    }
    module = SaeModule(members, n_steps=config.trainer.steps)
    throughput = Throughput(config.sae.batch_size, every=config.trainer.log_every)
    trainer = build_trainer(
        config.trainer,
        run.path,
        callbacks=[throughput, *watch_faithfulness(config, frozen)],
        shard_latents=config.trainer.shard_latents,
    )
    fit(trainer, module, data, run.path)
    module.gather()
    if trainer.is_global_zero:
        assert data.store is not None, "it was trained on"
        fingerprint = hash_json(data.store.fingerprint)
        _finish(config, run, module, frozen, fingerprint)
        run.write_bad([one._asdict() for one in bad])
        run.update_manifest(data=fingerprint, rows_per_second=_report(throughput.rate, module))
        run.finish()


def _outputs(config: TrainSae) -> tuple[str, ...]:
    """What the run makes, and what runs of other grids have left in its folder."""
    names = list(config.sae.members())
    made = FILES if names == [""] else (TABLE, PICTURE, *names)
    folder = Path(config.runs) / config.name
    left = [name for name in (*FILES, TABLE, PICTURE) if (folder / name).exists()]
    # A run whose name is that of this one and more has a manifest; a member of a grid has none.
    left += [
        path.parent.name
        for path in (*folder.glob(f"*=*/{FILES[0]}"), *folder.glob(f"*=*/{METRICS}"))
        if not (path.parent / "manifest.json").exists()
    ]
    return tuple(dict.fromkeys([*made, *left]))


def _open_data(config: TrainSae, frozen: FrozenClip, bad: list[BadSample]) -> ActivationDataModule:
    """The rows; `bad` is filled with what is left out when they are opened."""
    progress = config.trainer.progress

    def open_store(ranks: Ranks) -> ActivationStore:
        images = find_images(config.data.shards, config.data, progress=progress)
        store = read_activations(frozen, images.usable, config.data, ranks=ranks, progress=progress)
        bad[:] = images.add_bad(store.bad, config.data.max_bad_fraction)
        return store

    return ActivationDataModule(
        open_store,
        batch_size=config.sae.batch_size,
        seed=config.seed,
        n_steps=config.trainer.steps,
        fields=("x",) if frozen.target is None else ("x", "y"),
    )


def _finish(
    config: TrainSae, run: RunFolder, module: SaeModule, frozen: FrozenClip, fingerprint: str
) -> None:
    """Measure and save every SAE that was trained to the end."""
    held_out = _read_held_out(frozen, config)
    found: dict[str, dict[str, float]] = {}
    for name, member in module.running.items():
        sae = member.finish().to(frozen.clip.device)  # the trainer has left it on the CPU
        found[name] = measure(sae, held_out, config.sae.batch_size, name)
        record = SaeRecord(
            site=frozen.cut.site.to_json(),
            model={"name": config.model.name, "weights_sha256": frozen.clip.weights_sha256},
            data_fingerprint=fingerprint,
            metrics=found[name],
            target_site=None if frozen.target is None else frozen.target.cut.site.to_json(),
        )
        save_sae(sae, run.path / name, record)
    if list(module.by_name) == [""]:
        run.write_metrics({"sae": found[""]})
    else:
        _write_grid(run, found, module.failures)


def _write_grid(
    run: RunFolder, found: Mapping[str, Mapping[str, float]], failures: Mapping[str, str]
) -> None:
    """Metrics of each in its folder and of all in that of the run, with the table and picture."""
    for name, metrics in found.items():
        _write_json(run.path / name / METRICS, {"sae": metrics})
    for name, reason in failures.items():
        _write_json(run.path / name / METRICS, {"failed": reason})
        logger.error("%s was stopped: %s", name, reason)
    run.write_metrics({"sae": found, "failed": failures})
    points = [
        SaePoint(name, each["l0"], each["fvu"], each["dead_fraction"], each["cosine"])
        for name, each in found.items()
    ]
    write_bytes(run.path / PICTURE, pareto_png(points))
    write_text(run.path / TABLE, pareto_table(points))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _report(rate: float | None, module: SaeModule) -> float | None:
    """Rows per second of this start."""
    if rate is not None:
        n_saes = len(module.running)
        logger.info("%.0f rows/s%s", rate, f" through each of {n_saes} SAEs" * (n_saes > 1))
    return rate


def _read_held_out(frozen: FrozenClip, config: TrainSae) -> ActivationStore:
    progress = config.trainer.progress
    images = find_images(config.held_out, config.data, setting="held_out", progress=progress)
    return read_activations(frozen, images.usable, config.data, progress=progress)


def measure(sae: Sae, store: ActivationStore, batch_size: int, name: str) -> dict[str, float]:
    """Reconstruction of the held-out rows."""
    result = reconstruct(sae, store, batch_size)
    metrics = {
        "fvu": float(result.fvu),
        "explained_variance": float(result.explained_variance),
        "l0": float(result.l0),
        "cosine": float(result.cosine),
        "dead_fraction": float(result.dead_fraction),
        "n_rows": float(result.n_rows),
    }
    logger.info(
        "held-out%s: FVU %.4f at L0 %.1f, %.1f %% of %d latents never fired on %d rows",
        name and f", {name}",
        metrics["fvu"],
        metrics["l0"],
        100 * metrics["dead_fraction"],
        sae.n_latents,
        int(metrics["n_rows"]),
    )
    return metrics


@torch.no_grad()
def reconstruct(sae: Sae, store: ActivationStore, batch_size: int) -> ReconstructionResult:
    """How well the rows of a store are reconstructed, each of which is seen exactly once.

    Of a transcoder: how well those of its target, the column y.
    """
    device = sae.W_dec.device
    # Only the first process measures; the others would never come to a gathering.
    metric = Reconstruction(d_model=len(sae.b_dec), n_latents=sae.n_latents, sync_on_compute=False)
    metric.to(device)
    due = _number(store.load("images"), store.load("tokens"))
    proof = ExactOnce(due, sync_on_compute=False)
    sites = ("x", "y") if isinstance(sae, Transcoder) else ("x",)
    for *rows, images, tokens in EvaluationStream(
        store, batch_size=batch_size, fields=(*sites, "images", "tokens")
    ):
        columns = [column.to(device).float() for column in rows]
        output = sae(columns[0])
        metric.update(columns[-1], output.recon, output.codes)
        proof.update(_number(images, tokens))
    proof.compute()
    return metric.compute()


def _number(images: Int[Tensor, " row"], tokens: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """One number for a token of an image; a store holds those of tokens in 16 bits."""
    return images.long() << 16 | tokens.long()

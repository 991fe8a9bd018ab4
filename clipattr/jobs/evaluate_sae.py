"""What an SAE reconstructs, and what the model loses when it is spliced in."""

import logging
from pathlib import Path

from clipattr.atomic import write_bytes, write_text
from clipattr.callbacks import SaeEvaluation, mean_by_type
from clipattr.callbacks.sae_evaluation import TypeResult
from clipattr.clip import Clip, Site, image_tower
from clipattr.config.schema import Atlas, EvaluateAttribution, EvaluateSae, Explain
from clipattr.errors import CheckpointError
from clipattr.jobs.class_head import load_classes, needed_fields
from clipattr.jobs.model import load_model
from clipattr.jobs.shards import find_images
from clipattr.jobs.site_states import CachedStates, FreshStates
from clipattr.jobs.start import Plan, describe_files, describe_model, describe_shards
from clipattr.metrics.latent_activity import EDGES
from clipattr.metrics.splice import VARIANTS, Measure, SpliceResult
from clipattr.report.frequency import frequency_png, latent_table
from clipattr.runs import RunFolder
from clipattr.sae.files import load_sae
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule
from clipattr.training.trainer import build_tester

logger = logging.getLogger(__name__)

METRICS, TABLE, PICTURE = "metrics.json", "latents.csv", "frequency.png"


def evaluate_sae(config: EvaluateSae, command: list[str]) -> None:
    """Write metrics.json, latents.csv and frequency.png of the run."""
    label, progress = config.zeroshot.label, config.trainer.progress
    classes = load_classes(config.zeroshot)
    folder = Path(config.sae)
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
        "prompts": classes.fingerprint,
        "weights": describe_files([folder / "sae.json", folder / "sae.safetensors"]),
    }
    plan = Plan(config, command, inputs, (METRICS, TABLE, PICTURE))
    if plan.is_finished():
        return
    needed = () if label is None else needed_fields(label)
    images = find_images(config.data.shards, config.data, needed, progress=progress)
    labels = None if label is None else classes.read_labels(images.usable, label)
    clip = load_model(config.model, config.trainer.accelerator)
    spliced = load_spliced(config, clip)
    head = classes.head(clip, config.data.cache, progress=progress)
    cut = spliced.cut
    if cut.is_whole and cut.site.tokens == "cls":
        states = CachedStates(
            clip, cut, images, config.data, n_mean=config.mean_images, progress=progress
        )
    else:
        states = FreshStates(clip, cut, images, config.data, n_mean=config.mean_images)
    evaluation = SaeEvaluation(spliced, mean_by_type(spliced, states.mean), head, labels)
    run = plan.open()
    trainer = build_tester(config.trainer, run.path, callbacks=[evaluation])
    trainer.test(SplicedModule(spliced), states, verbose=False)
    run.write_bad([one._asdict() for one in states.bad])
    run.update_manifest(data=images.usable.fingerprint)
    _write(run, evaluation)
    run.finish()


def load_spliced(
    config: EvaluateSae | EvaluateAttribution | Explain | Atlas, clip: Clip
) -> Spliced:
    """The SAE of a config in the tower."""
    return splice_in(config.sae, config.model.name, clip)


def splice_in(folder: str, model_name: str, clip: Clip) -> Spliced:
    """The SAE in the tower, at the site that its file names; one of another model is refused."""
    model = {"name": model_name, "weights_sha256": clip.weights_sha256}
    sae, record = load_sae(folder, expected_model=model, one_site=True)
    cut = image_tower(clip.model).cut(_site(record.site))
    if sae.d_model != cut.d_site:
        raise CheckpointError(
            f"sae={folder}: is of width {sae.d_model}; {cut.site} has {cut.d_site}"
        )
    return Spliced(cut, sae.requires_grad_(False).to(clip.device))


def _site(found: dict[str, str | int]) -> Site:
    return Site(int(found["layer"]), str(found["stream"]), str(found["tokens"]))


def _write(run: RunFolder, evaluation: SaeEvaluation) -> None:
    found = {name: _collect(each) for name, each in evaluation.types.items()}
    run.write_metrics(
        {
            "sae": found,
            "frequency_edges": list(EDGES),
            "identity_error": evaluation.identity_error,
        }
    )
    latents = evaluation.latents
    assert latents is not None, "after the test"
    table = latent_table(
        latents.firing_counts.tolist(),
        latents.mean.tolist(),
        latents.largest.tolist(),
        latents.n_rows,
    )
    write_text(run.path / TABLE, table)
    # All rows stand last, or are of the only type.
    of_all = list(evaluation.types.values())[-1].frequency
    write_bytes(
        run.path / PICTURE, frequency_png(of_all.counts, EDGES, of_all.dead, latents.n_rows)
    )
    for name, each in evaluation.types.items():
        _log(name, each)


def _collect(found: TypeResult) -> dict[str, object]:
    numbers = found.reconstruction
    return {
        "reconstruction": {
            "fvu": float(numbers.fvu),
            "explained_variance": float(numbers.explained_variance),
            "cosine": float(numbers.cosine),
            "l0": float(numbers.l0),
            "dead_fraction": float(numbers.dead_fraction),
            "n_rows": int(numbers.n_rows),
        },
        "frequency": {"dead": found.frequency.dead, "counts": found.frequency.counts},
        "splice": {
            "images": found.splice.n_images,
            **{name: _to_json(measure) for name, measure in _measures(found.splice).items()},
        },
    }


def _measures(splice: SpliceResult) -> dict[str, Measure]:
    found = splice._asdict()
    return {name: each for name, each in found.items() if isinstance(each, Measure)}


def _to_json(measure: Measure) -> dict[str, object]:
    found: dict[str, object] = dict(zip(VARIANTS, measure[:3], strict=True))
    if measure.intervals is not None:
        shares = [interval._asdict() for interval in measure.intervals]
        found = dict(zip(VARIANTS, shares, strict=True))
    return {**found, "recovered": measure.recovered}


def _log(name: str, found: TypeResult) -> None:
    numbers = found.reconstruction
    logger.info(
        "%s: FVU %.4f, cosine %.4f, L0 %.1f, %.1f %% dead, %d rows of %d images",
        name,
        float(numbers.fvu),
        float(numbers.cosine),
        float(numbers.l0),
        100 * float(numbers.dead_fraction),
        int(numbers.n_rows),
        found.splice.n_images,
    )
    logger.info("  %-14s %9s %9s %9s %10s", "spliced in", *VARIANTS, "recovered")
    for measure, each in _measures(found.splice).items():
        logger.info("  %-14s %9.4f %9.4f %9.4f %10.4f", measure, *each[:3], each.recovered)

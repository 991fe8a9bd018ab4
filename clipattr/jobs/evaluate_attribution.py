"""How faithful attribution is for a model, an SAE and a head, and on what each class relies."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from clipattr.atomic import write_bytes, write_text
from clipattr.attribution import Reliance, RelianceOrigin, save_reliance
from clipattr.attribution.reliance_files import ALL_IMAGES, IMAGES_OF_CLASS
from clipattr.callbacks import FaithfulnessCallback, GlobalDeletionCallback, RelianceCallback
from clipattr.config.choices import Method
from clipattr.config.schema import EvaluateAttribution
from clipattr.errors import ConfigError
from clipattr.jobs.attribution_inputs import Head, Rows, load_head, needed, read_rows
from clipattr.jobs.attribution_metrics import collect_faithfulness, log_table
from clipattr.jobs.class_head import load_classes
from clipattr.jobs.evaluate_sae import load_spliced
from clipattr.jobs.model import load_model
from clipattr.jobs.shards import find_images
from clipattr.jobs.site_states import Batch, OwnRows
from clipattr.jobs.start import Plan, describe_files, describe_model, describe_shards
from clipattr.jobs.untrained import build_untrained
from clipattr.report.faithfulness import Curve, MethodCurves, faithfulness_png
from clipattr.report.reliance import reliance_table, write_reliance_parquet
from clipattr.runs import RunFolder
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule
from clipattr.training.trainer import build_tester

logger = logging.getLogger(__name__)

METRICS, PICTURE, TABLE, LONG_TABLE, MATRIX = (
    "metrics.json",
    "faithfulness.png",
    "reliance.csv",
    "reliance.parquet",
    "reliance.safetensors",
)


def evaluate_attribution(config: EvaluateAttribution, command: list[str]) -> None:
    """Write metrics.json, faithfulness.png, and reliance as .csv, .parquet and .safetensors."""
    files = (METRICS, PICTURE, TABLE, LONG_TABLE, MATRIX)
    plan = Plan(config, command, _describe_inputs(config), files)
    if plan.is_finished():
        return
    progress = config.trainer.progress
    images = find_images(config.data.shards, config.data, needed(config), progress=progress)
    clip = load_model(config.model, config.trainer.accelerator)
    spliced = load_spliced(config, clip)
    _check_overlap(config, spliced)
    head = load_head(config, clip)
    rows = read_rows(config, clip, spliced, images, head)
    run = plan.open()
    table = _measure(config, run.path, spliced, head, rows)
    control = None
    if config.evaluation.control:
        x = torch.cat([x.flatten(0, -2) for x, _, _ in rows.chosen])
        k = max(1, round(_count_active(spliced, rows.chosen)))
        untrained = build_untrained(spliced, x, k=k, seed=config.seed)
        control = _measure(config, run.path, untrained, head, rows)
    model = {"name": config.model.name, "weights_sha256": clip.weights_sha256}
    reliance = _find_reliance(config, run.path, spliced, head, rows, table, model)
    run.write_bad([one._asdict() for one in rows.bad])
    run.update_manifest(data=images.usable.fingerprint)
    if table.is_first_process:
        _write(config, run, head, table, control, reliance)
    run.finish()


class Table(NamedTuple):
    """Both passes over the chosen images."""

    local: FaithfulnessCallback
    by_class_mean: GlobalDeletionCallback
    is_first_process: bool


def _describe_inputs(config: EvaluateAttribution) -> dict[str, object]:
    folder = Path(config.sae)
    weights = [folder / "sae.json", folder / "sae.safetensors"]
    inputs: dict[str, object] = {
        "model": describe_model(config.model),
        "shards": describe_shards(config.data.shards, "data.shards"),
    }
    if config.zeroshot is not None:
        inputs["prompts"] = load_classes(config.zeroshot).fingerprint
    if config.probe is not None:
        weights += [Path(config.probe) / f"probe.{kind}" for kind in ("json", "safetensors")]
    return {**inputs, "weights": describe_files(weights)}


def _check_overlap(config: EvaluateAttribution, spliced: Spliced) -> None:
    """With several tokens an image has more active latents than a row."""
    top, most = config.evaluation.overlap_top, spliced.sae.max_active
    if spliced.cut.site.tokens == "cls" and top >= most:
        raise ConfigError(
            f"evaluation.overlap_top={top}: must be below the {most} active latents of "
            f"{config.sae}; the overlap of all says nothing"
        )


def _test(
    config: EvaluateAttribution,
    folder: Path,
    spliced: Spliced,
    batches: Iterable[Batch],
    callback: Callback,
) -> L.Trainer:
    trainer = build_tester(config.trainer, folder, callbacks=[callback])
    own = OwnRows(batches, trainer.global_rank, trainer.world_size)
    trainer.test(SplicedModule(spliced), own, verbose=False)
    return trainer


def _measure(
    config: EvaluateAttribution, folder: Path, spliced: Spliced, head: Head, rows: Rows
) -> Table:
    """The table of one dictionary: local orders first, whose class means are the global ones."""
    settings = config.evaluation
    draw = {"resamples": settings.resamples, "seed": config.seed}
    local = FaithfulnessCallback(
        spliced,
        head.weights,
        rows.targets,
        methods=settings.methods,
        n_steps=settings.steps,
        ig_steps=settings.ig_steps,
        overlap_top=settings.overlap_top,
        bias=head.bias,
        sum_classes=True,
        **draw,
    )
    _test(config, folder, spliced, rows.chosen, local)
    whole = GlobalDeletionCallback(local.reader, rows.targets, local.rankings, **draw)
    trainer = _test(config, folder, spliced, rows.chosen, whole)
    return Table(local, whole, trainer.is_global_zero)


@torch.no_grad()
def _count_active(spliced: Spliced, batches: list[Batch]) -> float:
    """Active latents of a row on average."""
    n_active, n_rows = 0, 0
    for x, _, _ in batches:
        codes = spliced.sae.encode(x.to(spliced.sae.b_enc.device))
        n_active += int(codes.is_active.sum())
        n_rows += codes.values[..., 0].numel()
    return n_active / n_rows


def _find_reliance(
    config: EvaluateAttribution,
    folder: Path,
    spliced: Spliced,
    head: Head,
    rows: Rows,
    table: Table,
    model: dict[str, str],
) -> Reliance:
    """Of all images and every class in closed form; elsewhere of the images of each class."""
    signs = config.evaluation.signs
    if rows.all is not None:
        found = RelianceCallback(spliced, head.weights, signs=signs)
        _test(config, folder, spliced, rows.all, found)
        n_images, over = [found.n_images] * len(head.names), ALL_IMAGES
        mean, share, positive = found.mean_attribution, found.share_of_images, found.share_positive
        assert mean is not None, "after the test"
        assert share is not None, "after the test"
    else:
        counts = table.local.counts
        assert counts is not None, "attribution_patching is among the methods"
        n_images, over = counts.images.tolist(), IMAGES_OF_CLASS
        below = counts.images.clamp(min=1)[:, None]
        mean = table.local.class_totals[Method.attribution_patching] / below
        share = counts.fired.double() / below
        positive = counts.positive.float() / counts.fired if signs else None
    origin = RelianceOrigin(
        class_names=list(head.names),
        n_images=n_images,
        over=over,
        model=model,
        site=spliced.cut.site.to_json(),
        sae=config.sae,
        head=_describe_head(config),
    )
    return Reliance(mean, share, positive, origin)


def _describe_head(config: EvaluateAttribution) -> dict[str, str]:
    if config.zeroshot is not None:
        return {"templates": config.zeroshot.templates}
    assert config.probe is not None, "checked by the config"
    return {"probe": config.probe}


def _write(
    config: EvaluateAttribution,
    run: RunFolder,
    head: Head,
    table: Table,
    control: Table | None,
    reliance: Reliance,
) -> None:
    counts = table.local.counts
    assert counts is not None, "attribution_patching is among the methods"
    n_images = int(counts.images.sum())
    metrics = collect_faithfulness(table.local, table.by_class_mean, head.names)
    settings = {
        "images": n_images,
        "explained": config.evaluation.explained.name,
        "steps": table.local.n_steps,
        "site": table.local.spliced.cut.site.to_json(),
    }
    run.write_metrics({**settings, **metrics})
    log_table("trained dictionary", table.local, table.by_class_mean)
    if control is not None:
        found = collect_faithfulness(control.local, control.by_class_mean, head.names)
        del found["by_class"]
        run.write_metrics({"control": found})
        log_table("control: untrained dictionary", control.local, control.by_class_mean)
    curves = [
        MethodCurves(
            method.name,
            Curve(found.deletion_curve, found.deletion_error),
            Curve(found.insertion_curve, found.insertion_error),
        )
        for method, found in table.local.results.items()
    ]
    write_bytes(run.path / PICTURE, faithfulness_png(curves, n_images))
    write_text(run.path / TABLE, reliance_table(reliance, config.evaluation.top))
    write_reliance_parquet(reliance, run.path / LONG_TABLE)
    save_reliance(reliance, run.path)

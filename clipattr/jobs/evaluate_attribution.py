"""How faithful attribution is for a model, an SAE and a head, and on what each class relies."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from clipattr.atomic import write_bytes, write_text
from clipattr.callbacks import FaithfulnessCallback, GlobalDeletionCallback, RelianceCallback
from clipattr.config.choices import Method
from clipattr.config.schema import EvaluateAttribution
from clipattr.files import save_weights
from clipattr.jobs.attribution_inputs import Head, Rows, load_head, needed, read_rows
from clipattr.jobs.attribution_metrics import collect_faithfulness, log_table
from clipattr.jobs.class_head import load_classes
from clipattr.jobs.evaluate_sae import load_spliced
from clipattr.jobs.model import load_model
from clipattr.jobs.shards import find_images
from clipattr.jobs.site_states import Batch
from clipattr.jobs.start import Plan, describe_files, describe_model, describe_shards
from clipattr.report.faithfulness import Curve, MethodCurves, faithfulness_png
from clipattr.report.reliance import reliance_table
from clipattr.runs import RunFolder
from clipattr.sae.topk import TopKSae
from clipattr.spliced import Spliced
from clipattr.training.spliced_module import SplicedModule
from clipattr.training.trainer import build_tester

logger = logging.getLogger(__name__)

METRICS, PICTURE, TABLE, MATRIX = (
    "metrics.json",
    "faithfulness.png",
    "reliance.csv",
    "reliance.safetensors",
)


class Reliance(NamedTuple):
    """Mean attribution, and in which share of the images each latent fires."""

    mean_attribution: Float[Tensor, "class latent"]
    share_of_images: Float[Tensor, " latent"]
    over: str
    """which images the mean of a class is over"""


def evaluate_attribution(config: EvaluateAttribution, command: list[str]) -> None:
    """Write metrics.json, faithfulness.png, reliance.csv and reliance.safetensors of the run."""
    plan = Plan(config, command, _describe_inputs(config), (METRICS, PICTURE, TABLE, MATRIX))
    if plan.is_finished():
        return
    progress = config.trainer.progress
    images = find_images(config.data.shards, config.data, needed(config), progress=progress)
    clip = load_model(config.model, config.trainer.accelerator)
    spliced = load_spliced(config, clip)
    head = load_head(config, clip)
    rows = read_rows(config, clip, spliced, images, head)
    run = plan.open()
    l0, fired = _count(spliced, rows.chosen)
    table = _measure(config, run.path, spliced, head, rows)
    control = None
    if config.evaluation.control:
        untrained = _untrained(config, spliced, rows.chosen, k=max(1, round(l0)))
        control = _measure(config, run.path, untrained, head, rows)
    reliance = _find_reliance(config, run.path, spliced, head, rows, table, fired)
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


class OwnRows:
    """The part of each batch that one of several processes takes: each image once over all."""

    def __init__(self, batches: Iterable[Batch], rank: int, world_size: int) -> None:
        self._batches = batches
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        for x, rows, rest in self._batches:
            chosen = torch.arange(self._rank, len(rows), self._world_size, device=rows.device)
            if len(chosen):
                yield x[chosen], rows[chosen], rest.rows(chosen)


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
def _count(spliced: Spliced, batches: list[Batch]) -> tuple[float, Float[Tensor, " latent"]]:
    """Active latents of a row on average, and the share of the images in which each fires."""
    n_active, n_rows, n_images = 0, 0, 0
    device = spliced.sae.b_enc.device
    fired = torch.zeros(spliced.sae.n_latents, dtype=torch.float64, device=device)
    for x, _, _ in batches:
        codes = spliced.sae.encode(x.to(device))
        n_active += int(codes.is_active.sum())
        n_rows += codes.values[..., 0].numel()
        n_images += len(x)
        for one in torch.arange(len(x), device=device):
            of_image = codes.select(one[None])
            fired[of_image.indices[of_image.is_active].unique()] += 1
    return n_active / n_rows, fired / n_images


def _untrained(
    config: EvaluateAttribution, spliced: Spliced, batches: list[Batch], *, k: int
) -> Spliced:
    """Random directions around the mean of the data: what attribution says of any dictionary."""
    trained = spliced.sae
    sae = TopKSae(
        d_model=trained.d_model,
        n_latents=trained.n_latents,
        k=k,
        generator=torch.Generator().manual_seed(config.seed),
    )
    sae.initialise_from(torch.cat([x.flatten(0, -2) for x, _, _ in batches]).cpu())
    return Spliced(spliced.cut, sae.requires_grad_(False).to(trained.b_enc.device))


def _find_reliance(
    config: EvaluateAttribution,
    folder: Path,
    spliced: Spliced,
    head: Head,
    rows: Rows,
    table: Table,
    fired: Float[Tensor, " latent"],
) -> Reliance:
    """Of all images and every class in closed form; elsewhere of the images of each class."""
    if rows.all is not None:
        found = RelianceCallback(spliced, head.weights)
        _test(config, folder, spliced, rows.all, found)
        assert found.mean_attribution is not None, "after the test"
        assert found.share_of_images is not None, "after the test"
        return Reliance(found.mean_attribution, found.share_of_images, "all images")
    counts = rows.targets.bincount(minlength=len(head.names)).clamp(min=1)
    totals = table.local.class_totals[Method.attribution_patching]
    return Reliance(totals / counts[:, None].to(totals.device), fired, "images of the class")


def _write(
    config: EvaluateAttribution,
    run: RunFolder,
    head: Head,
    table: Table,
    control: Table | None,
    reliance: Reliance,
) -> None:
    n_images = len(table.local.targets)
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
    mean, share = reliance.mean_attribution.cpu(), reliance.share_of_images.cpu()
    write_text(run.path / TABLE, reliance_table(head.names, mean, share, config.evaluation.top))
    tensors = {"mean_attribution": mean.contiguous(), "share_of_images": share.contiguous()}
    described = {"class_names": list(head.names), "over": reliance.over}
    save_weights(run.path, Path(MATRIX).stem, tensors, described)

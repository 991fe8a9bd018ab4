"""What every latent of an SAE means, on which of them classes rely unexpectedly, and the pages."""

import json
import logging
import math
from pathlib import Path

import torch

from clipattr.atomic import write_text
from clipattr.attribution import Reliance, RelianceOrigin, save_reliance
from clipattr.clip import Clip
from clipattr.config.schema import Atlas
from clipattr.data import write_thumbnails
from clipattr.files import read_sha256
from clipattr.jobs.atlas_heat import read_heat
from clipattr.jobs.atlas_inputs import (
    Scored,
    load_head,
    read_classes,
    read_states,
    score_images,
)
from clipattr.jobs.atlas_pages import shown_images, write_pages
from clipattr.jobs.atlas_pass import Found, run_pass
from clipattr.jobs.atlas_tables import latent_columns, pair_columns
from clipattr.jobs.atlas_unexpected import Unexpected, find_unexpected
from clipattr.jobs.class_head import load_classes, needed_fields
from clipattr.jobs.evaluate_sae import load_spliced
from clipattr.jobs.model import load_model
from clipattr.jobs.shards import Images, find_images
from clipattr.jobs.start import Plan, describe_files, describe_model, describe_shards
from clipattr.report.atlas_tables import format_table, write_table
from clipattr.runs import RunFolder
from clipattr.semantics.atlas_files import STEM, AtlasOrigin, AtlasTensors, save_atlas
from clipattr.semantics.atlas_files import Atlas as AtlasFile
from clipattr.semantics.describe import Semantics, describe_latents
from clipattr.semantics.vocabulary import load_vocabulary
from clipattr.spliced import Spliced

logger = logging.getLogger(__name__)

LATENTS, UNEXPECTED, PAGES = "latents.parquet", "unexpected.parquet", "report/index.html"
UNEXPECTED_CSV, METRICS = "unexpected.csv", "metrics.json"
_OUTPUTS = (
    METRICS,
    f"{STEM}.json",
    f"{STEM}.safetensors",
    "reliance.json",
    "reliance.safetensors",
    LATENTS,
    UNEXPECTED,
    UNEXPECTED_CSV,
    PAGES,
)
_LISTED = 10


def atlas(config: Atlas, command: list[str]) -> None:
    """Write the tables, atlas.safetensors and report/index.html of the run."""
    plan = Plan(config, command, _describe_inputs(config), _OUTPUTS)
    if plan.is_finished():
        return
    progress, label = config.trainer.progress, config.zeroshot.label
    classes = load_classes(config.zeroshot)
    needed = () if label is None else needed_fields(label)
    images = find_images(config.data.shards, config.data, needed, progress=progress)
    labels = read_classes(config, classes, images)
    clip = load_model(config.model, config.trainer.accelerator)
    spliced = load_spliced(config, clip)
    head = load_head(config, clip, classes)
    states = read_states(config, clip, spliced, images)
    scored = score_images(config, clip, spliced, images, states, classes)
    run = plan.open()
    found = run_pass(config, run.path, spliced, head, states, scored.embeddings, labels)
    semantics = _describe(config, spliced, found, scored)
    unexpected = find_unexpected(
        found, semantics, scored, n_examples=config.atlas.examples, level=config.atlas.level
    )
    run.write_bad([one._asdict() for one in states.bad])
    run.update_manifest(data=images.usable.fingerprint)
    _save(config, run, clip, spliced, images, found, semantics, scored, unexpected)
    write_thumbnails(
        images.usable,
        shown_images(config, found),
        run.path / "report" / "thumbs",
        made_from=images.usable.fingerprint,
        size=config.atlas.thumbnail,
        progress=progress,
    )
    heat = None
    if config.atlas.heatmaps:
        heat = read_heat(config, clip, spliced, images, found.top.ids[:, : config.atlas.shown])
    index = write_pages(config, run, found, semantics, scored, unexpected, heat)
    run.finish()
    _log(unexpected, scored)
    logger.info("the pages: %s", index.resolve())


def _describe_inputs(config: Atlas) -> dict[str, object]:
    folder = Path(config.sae)
    weights = [folder / "sae.json", folder / "sae.safetensors"]
    if config.probe is not None:
        weights += [Path(config.probe) / f"probe.{kind}" for kind in ("json", "safetensors")]
    entries = config.atlas.vocabulary
    return {
        "model": describe_model(config.model),
        "scorer": describe_model(config.scorer),
        "shards": describe_shards(config.data.shards, "data.shards"),
        "prompts": load_classes(config.zeroshot).fingerprint,
        "vocabulary": list(load_vocabulary(entries).words) if entries else [],
        "weights": describe_files(weights),
    }


def _describe(config: Atlas, spliced: Spliced, found: Found, scored: Scored) -> Semantics:
    texts = scored.texts
    return describe_latents(
        embeddings=scored.embeddings,
        examples=found.top.ids[:, : config.atlas.examples],
        W_dec=spliced.sae.directions.detach().cpu(),
        texts=texts.of_words,
        empty_text=texts.empty,
        n_labels=min(config.atlas.labels, len(texts.words)),
    )


def _save(
    config: Atlas,
    run: RunFolder,
    clip: Clip,
    spliced: Spliced,
    images: Images,
    found: Found,
    semantics: Semantics,
    scored: Scored,
    unexpected: Unexpected,
) -> None:
    origin = AtlasOrigin(
        model={"name": config.model.name, "weights_sha256": clip.weights_sha256},
        sae=read_sha256(Path(config.sae), "sae"),
        site=spliced.cut.site.to_json(),
        scorer={
            "name": config.scorer.name,
            "pretrained": config.scorer.pretrained,
            "precision": config.scorer.precision.name,
            "weights_sha256": scored.clip.weights_sha256,
        },
        words=list(scored.texts.words),
        templates=list(load_classes(config.zeroshot).templates),
        shards=config.data.shards,
        images=images.usable.fingerprint,
        n_examples=config.atlas.examples,
    )
    tensors = AtlasTensors(
        semantics.means.float(),
        semantics.labels,
        semantics.label_scores.float(),
        found.top.ids,
        found.top.values,
    )
    save_atlas(AtlasFile(tensors, origin), run.path)
    save_reliance(_reliance(config, origin, found, scored), run.path)
    described = {
        "model": config.model.name,
        "site": json.dumps(spliced.cut.site.to_json()),
        "sae": config.sae,
        "shards": config.data.shards,
        "scorer": config.scorer.name,
    }
    write_table(latent_columns(found, semantics, scored), run.path / LATENTS, described)
    pairs = pair_columns(unexpected, scored, semantics)
    write_table(pairs, run.path / UNEXPECTED, described)
    write_text(run.path / UNEXPECTED_CSV, format_table(pairs))
    run.write_metrics({"atlas": _collect(found, semantics, unexpected)})


def _reliance(config: Atlas, origin: AtlasOrigin, found: Found, scored: Scored) -> Reliance:
    """On what each class relies, in the form of `evaluate_attribution`."""
    reliance = found.reliance
    head = {"probe": config.probe} if config.probe else {"prompts": config.zeroshot.templates}
    described = RelianceOrigin(
        class_names=list(scored.texts.names),
        n_images=reliance.n_images,
        over=reliance.over,
        model=origin.model,
        site=origin.site,
        sae=config.sae,
        head=head,
    )
    return Reliance(
        reliance.mean_attribution, reliance.share_of_images, reliance.share_positive, described
    )


def _collect(found: Found, semantics: Semantics, unexpected: Unexpected) -> dict[str, object]:
    def mean(values: torch.Tensor) -> float | None:
        value = float(values.double().nanmean())
        return None if math.isnan(value) else value

    threshold, activity = unexpected.threshold, found.latents.activity
    assert activity is not None, "after the pass"
    assert found.latents.monosemanticity is not None, "after the pass"
    return {
        "images": activity.n_rows,
        "latents": len(semantics.means),
        "latents_that_fire": int((activity.firing_counts > 0).sum()),
        "clarity": mean(semantics.clarity),
        "polysemanticity": mean(semantics.polysemanticity),
        "monosemanticity": mean(found.latents.monosemanticity.cpu()),
        "redundancy": mean(semantics.nearest_cosine),
        "unexpected": {
            "latents": threshold.n_found,
            "pairs": len(unexpected.pairs),
            "classes": len({pair.class_number for pair in unexpected.pairs}),
            "by_chance": threshold.n_by_chance,
            "by_shuffled_latents": unexpected.by_names,
            "by_shuffled_images": unexpected.by_meanings,
            "false_discovery_rate": threshold.false_discovery_rate,
            "evidence_threshold": threshold.evidence if threshold.n_found else None,
            "before_threshold": unexpected.n_candidates,
        },
    }


def _log(unexpected: Unexpected, scored: Scored) -> None:
    threshold, texts = unexpected.threshold, scored.texts
    logger.info("")
    logger.info(
        "%d latents drive a class and mean something else, or a part of its name; as strong are "
        "%.1f of shuffled latents and %.1f of shuffled images (%.1f %%)",
        threshold.n_found,
        unexpected.by_names,
        unexpected.by_meanings,
        100 * threshold.false_discovery_rate,
    )
    if not threshold.n_found:
        logger.info("(few images leave latents with too few examples to mean anything)")
    logger.info(
        "%4s  %-20s %7s  %9s %9s  %s", "rank", "class", "latent", "evidence", "alignment", "why"
    )
    for pair in unexpected.listed[:_LISTED]:
        why = pair.suggestions[0]
        logger.info(
            "%4d  %-20s %7d  %9.3f %+9.3f  %s: %s",
            pair.rank,
            texts.names[pair.class_number],
            pair.latent,
            pair.evidence,
            pair.alignment,
            why.kind.value,
            why.reason,
        )

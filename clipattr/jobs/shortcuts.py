"""Which cues a probe leans on, how much more than prompts do, who is harmed, and repairs."""

import logging
from pathlib import Path

import torch

from clipattr.clip import load_templates
from clipattr.config.schema import Shortcuts
from clipattr.data.store import hash_json
from clipattr.jobs.shortcuts_amplified import (
    AmplifiedList,
    confirm,
    latents_to_confirm,
    name_of,
    rank,
)
from clipattr.jobs.shortcuts_atlas import add_cues, atlas_files, name_latents
from clipattr.jobs.shortcuts_controls import Controls, add_controls, make_controls
from clipattr.jobs.shortcuts_cue_images import evaluated_images
from clipattr.jobs.shortcuts_cues import KnownCue, find_cues
from clipattr.jobs.shortcuts_effects import Passes, headline_score, look, measure_cue
from clipattr.jobs.shortcuts_groups import measure_groups, measure_heads
from clipattr.jobs.shortcuts_inputs import (
    TEXT,
    Audited,
    ImageSet,
    load_audited,
    read_images,
)
from clipattr.jobs.shortcuts_learned import Learned, read_learned
from clipattr.jobs.shortcuts_pages import CueFindings, build_content
from clipattr.jobs.shortcuts_pair_shards import read_pairs
from clipattr.jobs.shortcuts_pairs import CuePairs, make_pairs
from clipattr.jobs.shortcuts_removal import Removed, remove_each
from clipattr.jobs.shortcuts_repairs import (
    FOLDER,
    measure_reference,
    repair_cue,
    save_repairs,
)
from clipattr.jobs.shortcuts_tables import (
    AMPLIFIED,
    EFFECTS,
    GROUPS,
    REPAIRS,
    collect,
    log_tables,
    write_tables,
)
from clipattr.jobs.start import Plan, describe_files, describe_model, describe_shards
from clipattr.report.shortcuts.page import write_shortcuts_page
from clipattr.shortcuts.automatic import Ranking

logger = logging.getLogger(__name__)

METRICS, REPORT = "metrics.json", "report"


def shortcuts(config: Shortcuts, command: list[str]) -> None:
    """Write metrics.json, the tables, report/index.html and the repaired probes of the run."""
    made = (METRICS, EFFECTS, GROUPS, REPAIRS, f"{REPORT}/index.html")
    plan = Plan(config, command, _describe_inputs(config), made)
    if plan.is_finished():
        return
    audited = load_audited(config)
    config, meanings = add_cues(config, audited)
    images = read_images(config, audited, config.data.shards, "data.shards")
    learned = read_learned(config, audited, images)
    pairs = read_pairs(config, audited) | make_pairs(config, audited, images)
    cues = find_cues(config, audited, images, None if learned is None else learned.images, pairs)
    # Those of an earlier config must not lie beside the new ones.
    run = plan._replace(outputs=(*made, AMPLIFIED, FOLDER)).open()
    passes = look(config, audited, images, cues)
    ranking = rank(config, passes) if _is_automatic(config) else None
    controls = make_controls(config, audited, images, passes, learned, cues)
    findings = [
        _measure(config, audited, images, passes, cue, pairs.get(cue.name), learned, controls)
        for cue in cues
    ]
    amplified: AmplifiedList | None = None
    if ranking is not None:
        removed = _remove(config, audited, images, ranking)
        amplified = confirm(config, audited, images, passes, ranking, removed, cues)
    content = build_content(config, audited, images, passes, findings, amplified)
    content = name_latents(content, meanings)
    if learned is not None:
        for found in findings:
            save_repairs(config, audited, learned, run.path, found.cue, found.repairs)
    bad = images.bad if learned is None else [*images.bad, *learned.images.bad]
    run.write_bad([one._asdict() for one in bad])
    run.update_manifest(data=images.samples.fingerprint)
    run.write_metrics(collect(content))
    write_tables(content, run.path)
    page = write_shortcuts_page(content, run.path / REPORT)
    run.finish()
    log_tables(content)
    logger.info("the page: %s", page)


def _is_automatic(config: Shortcuts) -> bool:
    return config.sae is not None and config.shortcuts.automatic


def _describe_inputs(config: Shortcuts) -> dict[str, object]:
    folders = [(config.probe, "probe"), (config.sae, "sae"), (config.repair.reference, "probe")]
    weights = [
        Path(folder) / f"{stem}.{kind}"
        for folder, stem in folders
        if folder is not None
        for kind in ("json", "safetensors")
    ]
    shards = {
        "data.shards": config.data.shards,
        "pairs.shards": config.pairs.shards,
        "repair.shards": config.repair.shards,
    }
    return {
        "model": describe_model(config.model),
        "templates": hash_json(load_templates(config.templates)),
        "weights": describe_files([*weights, *atlas_files(config)]),
        **{
            setting: describe_shards(spec, setting)
            for setting, spec in shards.items()
            if spec is not None
        },
    }


def _remove(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    ranking: Ranking,
) -> dict[str, Removed]:
    """Without each latent that is to be confirmed."""
    confirmed = latents_to_confirm(config, ranking)
    latents = {name_of(one): torch.tensor([one]) for one in confirmed}
    return remove_each(audited, images, latents)


def _measure(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    cue: KnownCue,
    pairs: CuePairs | None,
    learned: Learned | None,
    controls: Controls,
) -> CueFindings:
    measured = measure_cue(config, audited, passes, cue, pairs)
    measured = add_controls(config, audited, passes, cue, pairs, measured, controls)
    shown = evaluated_images(images, passes, cue, pairs)
    groups = measure_groups(config, audited, cue, shown)
    quality = measure_heads(audited, passes, shown)
    repairs = []
    if learned is not None:
        reference = measure_reference(audited, shown, quality[TEXT].quality).worst_group
        score = headline_score(measured.effects, audited.scores)
        repairs = repair_cue(
            config, audited, images, passes, learned, cue, pairs, shown, reference, score
        )
    return CueFindings(cue, measured, groups, quality, pairs, repairs)

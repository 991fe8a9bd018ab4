"""Repairs of a probe: learned on other images, measured on the evaluated ones, and saved."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.callbacks import take_all
from clipattr.callbacks.base import Batch
from clipattr.callbacks.shortcuts_result import UNDEFINED, measure_effect
from clipattr.callbacks.suppressed import LatentMeans, SuppressedEmbeddings
from clipattr.config.choices import RepairMethod
from clipattr.config.schema import Shortcuts
from clipattr.files import read_sha256
from clipattr.jobs.shortcut_repair import (
    METHODS,
    STRENGTHS,
    Method,
    Repaired,
    RepairRows,
    obstacle,
    repair,
    save_repaired,
    trade_off,
)
from clipattr.jobs.shortcuts_cue_images import CueImages
from clipattr.jobs.shortcuts_cues import KnownCue
from clipattr.jobs.shortcuts_effects import Passes
from clipattr.jobs.shortcuts_groups import measure_logits, share_right
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet
from clipattr.jobs.shortcuts_learned import Learned, images_to_learn
from clipattr.jobs.shortcuts_pairs import FEWEST_PAIRS, WITH, WITHOUT, CuePairs
from clipattr.jobs.shortcuts_provenance import repaired_fingerprint
from clipattr.metrics.intervals import Interval
from clipattr.metrics.quality import Quality
from clipattr.probes.files import ProbeRecord
from clipattr.probes.linear import LinearProbe, linear_logits
from clipattr.shortcuts.contrast import contrast_logits
from clipattr.shortcuts.repair import Suppression, restored_share
from clipattr.shortcuts.suppression_files import FEATURE, SuppressionRecord

FOLDER = "repaired"


class RepairedCue(NamedTuple):
    """One repair of one cue, measured."""

    repaired: Repaired
    quality: list[Quality]
    """at each strength; the last one is that of the saved probe"""
    accuracy_of_all: float
    """of the saved probe, over all evaluated images as they are"""
    effect: Interval
    """of the cue on the repaired probe, in standard deviations of its score"""
    restored: float
    suppression: Suppression | None


def repair_cue(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    learned: Learned,
    cue: KnownCue,
    pairs: CuePairs | None,
    shown: CueImages,
    reference: float,
    score: int,
) -> list[RepairedCue]:
    """Every method that can be used for the cue; why the others cannot is added to its warnings.

    `score` is the one whose effect is the headline: what is left of it is measured.
    """
    if cue.source is None:
        cue.warnings.append("no repair: nothing says which images have it, so that none is judged")
        return []
    learning = images_to_learn(config, audited, learned, cue)
    suppression = _find_suppression(config, audited, learning, cue)
    learn = _rows_of(audited, learning, suppression, (1.0,))
    evaluate = _rows_of(audited, shown, suppression, STRENGTHS)
    direction = None if bool(learn.known.any()) else cue.direction
    found = repair(
        audited.probe,
        learn,
        evaluate,
        methods=_usable(config, audited, learn, direction, cue),
        direction=direction,
        classes=audited.classes,
        Cs=config.repair.Cs,
        seed=config.seed,
    )
    measured: list[RepairedCue] = []
    for each in found:
        used = suppression if each.needs_suppression else None
        quality = trade_off(each, evaluate)
        unedited = passes.result.embeddings
        of_all = each.logits[-1]
        if cue.source == "pairs":
            of_all = _read(audited, images.batches, unedited, each.probe, used)
        shown_pairs = None if pairs is None or len(pairs.keys) < FEWEST_PAIRS else pairs
        sides = _sides(audited, images, passes, each.probe, of_all, cue, shown_pairs, used)
        effect = UNDEFINED
        if sides is not None:
            is_removal = shown_pairs is None
            effect = _effect(config, *sides, of_all, score, same_images=is_removal)
        restored = restored_share(quality[0].worst_group, quality[-1].worst_group, reference)
        right = share_right(of_all, passes)
        measured.append(RepairedCue(each, quality, right, effect, restored, used))
    return measured


def _usable(
    config: Shortcuts,
    audited: Audited,
    learn: RepairRows,
    direction: Float[Tensor, " embed"] | None,
    cue: KnownCue,
) -> list[Method]:
    methods: list[Method] = []
    for method in METHODS:
        if RepairMethod(method) not in config.repair.methods:
            continue
        reason = obstacle(method, learn, direction=direction, classes=audited.classes)
        if reason is None:
            methods.append(method)
        else:
            cue.warnings.append(f"no repair by {method}: {reason}")
    return methods


def _find_suppression(
    config: Shortcuts, audited: Audited, learning: CueImages, cue: KnownCue
) -> Suppression | None:
    """Latents at their mean over the images to learn from."""
    wanted = {RepairMethod.suppress, RepairMethod.retrain} & set(config.repair.methods)
    if audited.spliced is None or not len(cue.latents) or not wanted:
        return None
    means = LatentMeans(cue.latents, audited.spliced.sae.n_latents)
    take_all(audited.spliced, learning.batches, means)
    means.finish()
    assert means.result is not None, "after the pass"
    return Suppression(cue.latents, means.result.float().cpu())


def _rows_of(
    audited: Audited,
    found: CueImages,
    suppression: Suppression | None,
    strengths: Sequence[float],
) -> RepairRows:
    cleaned = None
    if suppression is not None:
        cleaned = _suppress(audited, found.batches, suppression, strengths)
    return RepairRows(found.embeddings, cleaned, found.labels, *found.flags, found.sources)


def _suppress(
    audited: Audited, batches: Iterable[Batch], suppression: Suppression, strengths: Sequence[float]
) -> Float[Tensor, "strength image embed"]:
    assert audited.spliced is not None, "there are latents"
    callback = SuppressedEmbeddings(audited.spliced, *suppression, strengths)
    take_all(audited.spliced, batches, callback)
    callback.finish()
    assert callback.result is not None, "after the pass"
    return callback.result.cpu()


def _read(
    audited: Audited,
    batches: Iterable[Batch],
    embeddings: Float[Tensor, "image embed"],
    probe: LinearProbe,
    suppression: Suppression | None,
) -> Float[Tensor, "image class"]:
    """Logits of a repaired probe, which sees embeddings as they are or with latents suppressed."""
    if suppression is not None:
        embeddings = _suppress(audited, batches, suppression, (1.0,))[-1]
    return linear_logits(embeddings, probe.weight, probe.bias)


def _sides(
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    probe: LinearProbe,
    of_all: Float[Tensor, "image class"],
    cue: KnownCue,
    pairs: CuePairs | None,
    suppression: Suppression | None,
) -> tuple[Float[Tensor, "n class"], Float[Tensor, "n class"]] | None:
    """Logits with the cue and without it: of the pairs, else of the removal of its latents."""
    if pairs is not None:
        with_cue, without = (
            _read(audited, pairs.states[side], pairs.embeddings[side], probe, suppression)
            for side in (WITH, WITHOUT)
        )
        return with_cue, without
    if not len(cue.latents) or suppression is not None:
        # Latents that are held at their means cannot be taken out: nothing to measure.
        return None
    zero = Suppression(cue.latents, torch.zeros(len(cue.latents)))
    return of_all, _read(audited, images.batches, passes.result.embeddings, probe, zero)


def _effect(
    config: Shortcuts,
    with_cue: Float[Tensor, "n class"],
    without: Float[Tensor, "n class"],
    of_all: Float[Tensor, "image class"],
    score: int,
    *,
    same_images: bool,
) -> Interval:
    """In standard deviations over the evaluated images, as the effects on the heads."""
    changes = contrast_logits(with_cue - without)[:, score]
    scores = contrast_logits(of_all)[:, score]
    if not scores.std(correction=0) > 0:  # a probe that learned nothing says the same of all
        return UNDEFINED
    return measure_effect(
        changes,
        scores,
        same_images=same_images,
        what="repaired probe",
        resamples=config.shortcuts.resamples,
        seed=config.seed,
    )


def measure_reference(audited: Audited, shown: CueImages, text: Quality) -> Quality:
    """What could be reached: a probe that never saw the cue, or else the prompts."""
    if audited.reference is None:
        return text
    weights, bias = audited.reference.weight, audited.reference.bias
    return measure_logits(linear_logits(shown.embeddings, weights, bias), shown)


def save_repairs(
    config: Shortcuts,
    audited: Audited,
    learned: Learned,
    folder: Path,
    cue: KnownCue,
    repairs: Sequence[RepairedCue],
) -> None:
    """Each as <folder>/repaired/<cue>/<method>/probe.safetensors, with what its input needs."""
    for each in repairs:
        last = each.quality[-1]
        metrics = {"accuracy": each.accuracy_of_all, "worst_group_accuracy": last.worst_group}
        record = ProbeRecord(
            class_names=list(audited.classes),
            model=audited.model,
            label_field=audited.label,
            data_fingerprint=repaired_fingerprint(config, audited, learned, each.repaired.name),
            metrics=metrics,
            feature=audited.record.feature if each.suppression is None else FEATURE,
            preprocess=audited.record.preprocess,
        )
        beside = None
        if each.suppression is not None:
            assert config.sae is not None, "there are latents"
            assert audited.spliced is not None, "there are latents"
            site, n_latents = audited.spliced.cut.site.to_json(), audited.spliced.sae.n_latents
            sha256 = read_sha256(Path(config.sae), "sae")
            found = SuppressionRecord(cue.name, config.sae, sha256, n_latents, site, audited.model)
            beside = (each.suppression, found)
        save_repaired(
            folder / FOLDER / cue.name / each.repaired.name, each.repaired, record, beside
        )

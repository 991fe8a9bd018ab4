"""Repairs of a probe: learned on other images, measured on the evaluated ones, and saved."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.callbacks import take_all
from clipattr.callbacks.base import Batch
from clipattr.callbacks.shortcuts_result import UNDEFINED
from clipattr.callbacks.suppressed import LatentMeans, SuppressedEmbeddings
from clipattr.config.schema import Shortcuts
from clipattr.config.shortcuts import RepairMethod
from clipattr.data.shards import Sample
from clipattr.errors import ConfigError, DataError
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
from clipattr.jobs.shortcuts_cues import KnownCue, infer_flags, read_flags
from clipattr.jobs.shortcuts_effects import Passes
from clipattr.jobs.shortcuts_groups import flags_of_rows, quality_of
from clipattr.jobs.shortcuts_inputs import Audited, ImageSet, read_images
from clipattr.jobs.shortcuts_latents import Flags
from clipattr.jobs.shortcuts_pairs import WITH, WITHOUT, CuePairs, embed_states
from clipattr.metrics.intervals import Interval, bootstrap_mean
from clipattr.metrics.quality import Quality
from clipattr.probes.files import ProbeRecord
from clipattr.probes.linear import LinearProbe
from clipattr.shortcuts.amplification import standardise
from clipattr.shortcuts.contrast import contrast_logits
from clipattr.shortcuts.repair import Suppression, restored_share
from clipattr.shortcuts.suppression_files import FEATURE, SuppressionRecord

FOLDER = "repaired"


class Learned(NamedTuple):
    """The images that repairs are learned from."""

    images: ImageSet
    rows: Tensor
    """samples that could be read"""
    embeddings: Float[Tensor, "image embed"]


class RepairedCue(NamedTuple):
    """One repair of one cue, measured."""

    repaired: Repaired
    quality: list[Quality]
    """at each strength; the last one is that of the saved probe"""
    effect: Interval
    """of the cue on the repaired probe, in standard deviations of its score"""
    restored: float
    suppression: Suppression | None


def read_learned(config: Shortcuts, audited: Audited, images: ImageSet) -> Learned | None:
    """Images of repair.shards, of which none may be evaluated."""
    if config.repair.shards is None:
        return None
    found = read_images(config, audited, config.repair.shards, "repair.shards")
    _check_apart(config, images, found)
    rows = torch.cat([row.cpu() for _, row, _ in found.batches]).sort().values
    embeddings = embed_states(audited, found.batches, len(found.samples))[rows]
    return Learned(found, rows, embeddings)


def _check_apart(config: Shortcuts, images: ImageSet, learned: ImageSet) -> None:
    """A repair that has seen the evaluated images would look better than it is."""
    where = f"repair.shards={config.repair.shards} and data.shards={config.data.shards}"
    rule = "repairs are learned from images that are not evaluated"
    shared = {str(one) for one in images.samples.shards} & {str(o) for o in learned.samples.shards}
    if shared:
        raise ConfigError(f"{where}: both have {min(shared)}; {rule}")
    row_of = {key: row for row, key in enumerate(images.keys)}
    for row, key in enumerate(learned.keys):
        if key in row_of and _is_same(learned.samples[row], images.samples[row_of[key]]):
            raise ConfigError(f"{where}: the image {key} is in both; {rule}")


def _is_same(first: Sample, second: Sample) -> bool:
    """Whether two samples are the same picture, bit for bit."""
    name, other = first.image_field, second.image_field
    assert name is not None, "every usable sample has an image"
    assert other is not None, "every usable sample has an image"
    if first.fields[name][1] != second.fields[other][1]:
        return False
    return first.read(name) == second.read(other)


def repair_cue(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    learned: Learned,
    cue: KnownCue,
    pairs: CuePairs | None,
    reference: float,
) -> list[RepairedCue]:
    """Every method that can be used for the cue; why the others cannot is added to its warnings."""
    flags = flags_of_rows(passes, cue)
    if flags is None:
        cue.warnings.append("no repair: nothing says which images have it, so that none is judged")
        return []
    suppression = _find_suppression(config, audited, learned, cue)
    learn, evaluate = _rows_of(config, audited, images, passes, learned, cue, flags, suppression)
    direction = None if bool(learn.known.any()) else cue.direction
    methods: list[Method] = []
    for method in METHODS:
        if RepairMethod(method) not in config.repair.methods:
            continue
        reason = obstacle(method, learn, direction=direction)
        if reason is None:
            methods.append(method)
        else:
            cue.warnings.append(f"no repair by {method}: {reason}")
    found = repair(
        audited.probe,
        learn,
        evaluate,
        methods=methods,
        direction=direction,
        Cs=config.repair.Cs,
        seed=config.seed,
    )
    return [
        _measure(config, audited, images, evaluate, each, cue, pairs, suppression, reference)
        for each in found
    ]


def _find_suppression(
    config: Shortcuts, audited: Audited, learned: Learned, cue: KnownCue
) -> Suppression | None:
    """Latents at their mean over the images to learn from."""
    wanted = {RepairMethod.suppress, RepairMethod.retrain} & set(config.repair.methods)
    if audited.spliced is None or not len(cue.latents) or not wanted:
        return None
    means = LatentMeans(cue.latents, audited.spliced.sae.n_latents)
    take_all(audited.spliced, learned.images.batches, means)
    means.finish()
    assert means.result is not None, "after the pass"
    return Suppression(cue.latents, means.result.float().cpu())


def _rows_of(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    learned: Learned,
    cue: KnownCue,
    flags: Flags,
    suppression: Suppression | None,
) -> tuple[RepairRows, RepairRows]:
    of_learned = _learned_flags(audited, learned, cue)
    cleaned = [
        None if suppression is None else _suppress(audited, batches, suppression, strengths)
        for batches, strengths in ((learned.images.batches, (1.0,)), (images.batches, STRENGTHS))
    ]
    labels = learned.images.labels[learned.rows]
    learn = RepairRows(learned.embeddings, cleaned[0], labels, *of_learned)
    evaluate = RepairRows(passes.result.embeddings, cleaned[1], passes.labels, *flags)
    return learn, evaluate


def _learned_flags(audited: Audited, learned: Learned, cue: KnownCue) -> Flags:
    """As on the evaluated images: written down, or inferred from the latents."""
    flags = read_flags(cue.settings, learned.images)
    if flags is None:
        try:
            flags, _ = infer_flags(audited, learned.images, cue.latents)
        except DataError as error:  # latents may fire in none of these images
            cue.warnings.append(f"which images of repair.shards have it is not known: {error}")
            unknown = torch.zeros(len(learned.images.samples), dtype=torch.bool)
            flags = Flags(unknown, unknown)
    return Flags(flags.has[learned.rows], flags.known[learned.rows])


def _suppress(
    audited: Audited, batches: Iterable[Batch], suppression: Suppression, strengths: Sequence[float]
) -> Float[Tensor, "strength image embed"]:
    assert audited.spliced is not None, "there are latents"
    callback = SuppressedEmbeddings(audited.spliced, *suppression, strengths)
    take_all(audited.spliced, batches, callback)
    callback.finish()
    assert callback.result is not None, "after the pass"
    return callback.result.cpu()


def _measure(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    evaluate: RepairRows,
    repaired: Repaired,
    cue: KnownCue,
    pairs: CuePairs | None,
    suppression: Suppression | None,
    reference: float,
) -> RepairedCue:
    quality = trade_off(repaired, evaluate)
    used = suppression if repaired.needs_suppression else None
    effect = _effect(config, audited, images, evaluate, repaired, cue, pairs, used)
    restored = restored_share(quality[0].worst_group, quality[-1].worst_group, reference)
    return RepairedCue(repaired, quality, effect, restored, used)


def _effect(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    evaluate: RepairRows,
    repaired: Repaired,
    cue: KnownCue,
    pairs: CuePairs | None,
    suppression: Suppression | None,
) -> Interval:
    """On the score that moves most: of the pairs, else of the removal of the cue's latents."""
    if pairs is not None:
        sides = [
            pairs.embeddings[variant]
            if suppression is None
            else _suppress(audited, pairs.states[variant], suppression, (1.0,))[-1]
            for variant in (WITH, WITHOUT)
        ]
    elif len(cue.latents):
        if suppression is not None:
            # They are at their means, whatever they were.
            return Interval(0.0, 0.0, 0.0)
        zero = Suppression(cue.latents, torch.zeros(len(cue.latents)))
        sides = [evaluate.embeddings, _suppress(audited, images.batches, zero, (1.0,))[-1]]
    else:
        return UNDEFINED
    with_cue, without = (contrast_logits(logits_of(repaired.probe, side)) for side in sides)
    effects, scores = with_cue - without, contrast_logits(repaired.logits[-1])
    moved = int((effects.mean(dim=0) / scores.std(dim=0, correction=0)).abs().argmax())
    generator = torch.Generator().manual_seed(config.seed)
    values = standardise(effects[:, moved], scores[:, moved])
    return bootstrap_mean(values, resamples=config.shortcuts.resamples, generator=generator)


def logits_of(
    probe: LinearProbe, embeddings: Float[Tensor, "image embed"]
) -> Float[Tensor, "image class"]:
    """In float64, on the CPU."""
    weights, bias = probe.weight.detach().double().cpu(), probe.bias.detach().double().cpu()
    return embeddings.double() @ weights.T + bias


def measure_reference(audited: Audited, passes: Passes, cue: KnownCue, text: Quality) -> Quality:
    """What could be reached: a probe that never saw the cue, or else the prompts."""
    flags = flags_of_rows(passes, cue)
    if audited.reference is None or flags is None:
        return text
    probabilities = logits_of(audited.reference, passes.result.embeddings).softmax(dim=1)
    return quality_of(probabilities, passes, flags)


def save_repairs(
    config: Shortcuts, audited: Audited, folder: Path, cue: KnownCue, repairs: Sequence[RepairedCue]
) -> None:
    """Each as <folder>/repaired/<cue>/<method>/probe.safetensors, with what its input needs."""
    for each in repairs:
        last = each.quality[-1]
        metrics = {"accuracy": last.accuracy, "worst_group_accuracy": last.worst_group}
        record = ProbeRecord(
            class_names=list(audited.classes),
            model=audited.model,
            label_field=audited.label,
            data_fingerprint=audited.record.data_fingerprint,
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
